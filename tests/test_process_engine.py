"""`engine="process"`: the answers of the thread, and a child that outlives nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.engine.loop import State
from molmo_edge.errors import ConfigError, EngineDeadError, PromptError
from tests.models import gemma3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def apart(cache_dir: Path) -> Iterator[EdgeVLM]:
    with EdgeVLM(
        "stub", cache_dir=cache_dir, engine="process", max_model_len=2048, kv_cache_memory_gb=0.25
    ) as vlm:
        yield vlm


def children() -> list[psutil.Process]:
    """Processes of the engine, its workers included."""
    return [p for p in psutil.Process().children(recursive=True) if "VLLM" in p.name()]


def test_answers_are_those_of_the_thread(
    apart: EdgeVLM, stub_vlm: EdgeVLM, photo: np.ndarray
) -> None:
    assert children()
    assert (apart.environment["engine"], stub_vlm.environment["engine"]) == ("process", "thread")
    for image, question in ((photo, "What is on the table?"), (None, "Tell a story.")):
        options = {"max_tokens": 24, "ignore_eos": True, "logprobs": 3}
        mine, theirs = (vlm.query(image, question, **options) for vlm in (apart, stub_vlm))
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_what_is_refused_or_cancelled_disturbs_nothing(apart: EdgeVLM, photo: np.ndarray) -> None:
    with pytest.raises(PromptError):
        apart.query(photo, "<im_patch>")
    with apart.stream(photo, "Tell a long story.", max_tokens=900, ignore_eos=True) as stream:
        next(iter(stream))
    apart.reset_caches()
    assert apart.query(photo, "What is there?", max_tokens=4).metrics.output_tokens == 4


def test_ctrl_c_at_the_terminal_does_not_end_it(apart: EdgeVLM) -> None:
    for child in children():
        child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert apart.query(None, "And now?", max_tokens=4).metrics.output_tokens == 4


def test_a_killed_child_is_a_dead_engine_and_leaves_nothing(tmp_path: Path) -> None:
    folder = gemma3_checkpoint.write_gemma3(tmp_path)
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (80, 90, 3), dtype=np.uint8))
    options = {
        "dtype": "float32",
        "max_model_len": 512,
        "kv_cache_memory_gb": 0.1,
        "enforce_eager": True,
    }
    asked = {"max_tokens": 8, "ignore_eos": True, "logprobs": 1}
    with EdgeVLM(folder, **options) as thread:
        meant = thread.query(image, "what is that?", **asked)
    with EdgeVLM(folder, engine="process", **options) as vlm:
        # Pictures that see themselves whole are the repair that a child needs too.
        found = vlm.query(image, "what is that?", **asked)
        assert found.logprobs == pytest.approx(meant.logprobs, abs=1e-5)
        before = {child.pid for child in children()}
        for child in children():
            child.kill()
        with pytest.raises(EngineDeadError):
            vlm.query(None, "and now?", max_tokens=400, ignore_eos=True)
        assert vlm.state is State.DEAD
        vlm.restart()
        assert vlm.query(None, "and now?", max_tokens=3, ignore_eos=True).token_ids
        again = [child for child in children() if child.pid not in before]
        assert again
    _, alive = psutil.wait_procs(again, timeout=30)
    assert not alive


SCRIPT = """
import os, sys, time
from molmo_edge import EdgeVLM

def main():
    vlm = EdgeVLM(
        sys.argv[1], engine="process", dtype="float32", max_model_len=512, kv_cache_memory_gb=0.1
    )
    print("up", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    main()
"""


def test_a_killed_parent_takes_the_child_along(tmp_path: Path) -> None:
    folder = gemma3_checkpoint.write_gemma3(tmp_path)
    script = tmp_path / "app.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as app:
        assert app.stdout is not None
        assert app.stdout.readline() == "up\n"
        theirs = psutil.Process(app.pid).children(recursive=True)
        assert any("VLLM" in p.name() for p in theirs)
        os.kill(app.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(theirs, timeout=30)
    assert not alive


def test_an_unguarded_script_is_told_what_it_lacks(tmp_path: Path) -> None:
    folder = gemma3_checkpoint.write_gemma3(tmp_path)
    script = tmp_path / "app.py"
    script.write_text(
        "import sys\nfrom molmo_edge import EdgeVLM\n"
        "EdgeVLM(sys.argv[1], engine='process', max_model_len=512, kv_cache_memory_gb=0.1)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert 'if __name__ == "__main__"' in done.stderr
    assert ConfigError.__name__ in done.stderr
