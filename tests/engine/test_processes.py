"""One vLLM engine per process, and a child that outlives nobody."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from molmo_edge import EdgeVLM
from molmo_edge.devices.detect import detect
from molmo_edge.engine.async_engine import AsyncEngine, killing_children_once
from molmo_edge.engine.loop import State
from molmo_edge.errors import ConfigError, EngineClosedError, EngineDeadError, EngineError
from molmo_edge.interface import EngineInfo, Rendered
from tests.conftest import STUB
from tests.engine.support import eventually

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def engines(process: psutil.Process) -> list[psutil.Process]:
    """Processes of vLLM's engines, workers included."""
    return [p for p in process.children(recursive=True) if "VLLM" in p.name()]


def test_a_second_engine_in_the_process_is_refused(stub_vlm: EdgeVLM, cache_dir: Path) -> None:
    with pytest.raises(ConfigError, match='engine="process"'):
        EdgeVLM(**STUB, cache_dir=cache_dir)
    assert stub_vlm.query(None, "x", max_tokens=3).text == "This is the"


def test_ctrl_c_at_the_terminal_does_not_end_the_child(process_vlm: EdgeVLM) -> None:
    stream = process_vlm.stream(None, "And now?", max_tokens=200, ignore_eos=True)
    for child in engines(psutil.Process()):
        child.send_signal(signal.SIGINT)
    assert stream.result().metrics.output_tokens == 200
    assert process_vlm.query(None, "x", max_tokens=4).metrics.output_tokens == 4


class Hanging:
    """What `AsyncEngine` uses of an `AsyncLLM`, whose process never answers."""

    def __init__(self) -> None:
        config = SimpleNamespace(model_type="molmo", embedding_size=8)
        self.model_config = SimpleNamespace(hf_config=config)
        self.vllm_config = SimpleNamespace(speculative_config=None)
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(ctx=self))
        self.calls: list[str] = []

    async def build(self) -> Hanging:
        self.output_handler = asyncio.ensure_future(self.get())
        return self

    async def get(self) -> Any:
        await asyncio.sleep(3600)

    get_nowait = reset_prefix_cache = lambda self: None

    async def add_request(self, *_: object) -> Hanging:
        return self

    async def abort(self, request_ids: list[str]) -> None:
        self.calls.append("abort")

    def shutdown(self, timeout: float) -> None:
        self.calls.append("shutdown")

    def destroy(self, linger: int) -> None:
        self.calls.append("destroy")


def test_a_child_that_hangs_holds_up_neither_cancels_nor_closing() -> None:
    from vllm import SamplingParams  # noqa: F401  # takes longer than a request waits

    llm = Hanging()

    def build() -> AsyncEngine:
        runner = asyncio.Runner()
        engine = AsyncEngine(runner.run(llm.build()), runner)
        engine.info = EngineInfo(2048)
        engine.renderer = SimpleNamespace(render=lambda turns, options: Rendered(None))  # type: ignore[assignment]
        return engine

    with EdgeVLM(engine=build, stall_s=1) as vlm:
        stream = vlm.stream(None, "x")
        eventually(lambda: vlm.state == "stalled")
        stream.cancel()
        eventually(lambda: llm.calls == ["abort"])
        stream = vlm.stream(None, "y")
        with pytest.raises(EngineError, match=r"within 0\.1 s"):
            vlm.in_engine_thread(lambda engine: engine.run(llm.get(), timeout_s=0.1))
        with pytest.raises(EngineDeadError):
            stream.result()
        vlm.restart()
        stream = vlm.stream(None, "x")
    with pytest.raises(EngineClosedError):
        stream.result()
    assert llm.calls == ["abort", "shutdown", "destroy", "shutdown", "destroy"]


def test_a_start_that_nobody_waits_for_is_killed() -> None:
    context = multiprocessing.get_context("spawn")
    names = ["EngineCore", "of the user", "EngineCore"]
    processes = [context.Process(target=time.sleep, args=(60,), name=name) for name in names]
    processes[0].start()  # of another engine
    with killing_children_once(lambda: True):
        for process in processes[1:]:
            process.start()
        processes[2].join()
    assert [process.is_alive() for process in processes] == [True, True, False]
    for process in processes:
        process.kill()
        process.join()


def test_the_death_of_the_child_reaches_every_waiter_and_leaves_nothing(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For `collective_rpc`, whose function crosses to the child.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    before = engines(psutil.Process())
    # Other processors emulate FP8, for minutes.
    precision = "fp8" if "avx512f" in detect().cpu_isa else "bf16"
    with EdgeVLM(**STUB, cache_dir=cache_dir, engine="process", precision=precision) as vlm:
        if precision == "fp8":
            check_fp8(vlm)
        children = [p for p in engines(psutil.Process()) if p not in before]
        streams = [vlm.stream(None, f"{i}", max_tokens=2000, ignore_eos=True) for i in range(3)]
        for stream in streams:
            next(stream)
        for child in children:
            child.kill()
        for stream in streams:
            with pytest.raises(EngineDeadError) as caught:
                stream.result()
            assert caught.value.__cause__ is not None
        assert vlm.state is State.DEAD
        with pytest.raises(EngineDeadError):
            vlm.query(None, "x")
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def check_fp8(vlm: EdgeVLM) -> None:
    """Online FP8 leaves tower, embeddings and head alone."""

    def dtypes(worker: Any) -> dict[str, str]:
        return {n: str(p.dtype) for n, p in worker.model_runner.model.named_parameters()}

    (names,) = vlm.in_engine_thread(lambda engine: engine.run(engine.llm.collective_rpc(dtypes)))
    assert vlm.query(None, "x", max_tokens=3).text == "This is the"
    assert vlm.environment["precision"] == "fp8"
    matrices = [d for n, d in names.items() if ".layers." in n and n.endswith("proj.weight")]
    assert matrices == ["torch.float8_e4m3fn"] * 16
    rest = {n: d for n, d in names.items() if ".layers." not in n}
    assert any("vision_backbone" in name for name in rest)
    assert set(rest.values()) == {"torch.bfloat16"}


SCRIPT = """
import sys, time
import psutil
from molmo_edge import EdgeVLM

SETTINGS = dict(model="stub", cache_dir=sys.argv[1], max_model_len=1024, kv_cache_memory_gb=0.5)

def own():
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared

def main():
    with EdgeVLM(**SETTINGS) as vlm:
        print(vlm.query(None, "x", max_tokens=3).text)
        during = own()
    print((during - own()) >> 20)
    vlm = EdgeVLM(**SETTINGS, engine="process")
    print(vlm.query(None, "x", max_tokens=3).text, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    main()
"""


def test_a_closed_engine_returns_its_memory_and_a_killed_parent_takes_the_child_along(
    cache_dir: Path, tmp_path: Path
) -> None:
    script = tmp_path / "app.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script), str(cache_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as app:
        assert app.stdout is not None
        assert app.stdout.readline() == "This is the\n"
        assert int(app.stdout.readline()) > 400  # MB; the KV cache alone has 512
        assert app.stdout.readline() == "This is the\n"
        children = engines(psutil.Process(app.pid))
        assert children
        os.kill(app.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def test_a_script_without_a_main_guard_gets_a_clear_error(cache_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(
        "import sys\nfrom molmo_edge import EdgeVLM\n"
        "EdgeVLM('stub', cache_dir=sys.argv[1], engine='process')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(cache_dir)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert 'if __name__ == "__main__"' in done.stderr
    assert ConfigError.__name__ in done.stderr
