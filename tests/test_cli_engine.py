"""Every verb of the command line on the real engine and the stub, which is named as one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import molmo_edge
from molmo_edge import EdgeVLM
from molmo_edge.cli.app import main
from molmo_edge.models.molmo.stub import NOTICE, TEXT

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def image(tmp_path: Path, photo: np.ndarray) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    return path


@pytest.fixture
def run(
    stub_vlm: EdgeVLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    # The engine outlives the command.
    monkeypatch.setattr(
        molmo_edge, "EdgeVLM", lambda *args, **settings: nullcontext(stub_vlm), raising=False
    )
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object, stdin: bytes | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_every_verb_answers_and_names_the_stub(run: Run, image: Path) -> None:
    assert run("ask", "-", "What?", stdin=image.read_bytes())[:2] == (0, f"{TEXT}\n")
    assert run("caption", image)[1:] == (f"{TEXT}\n", f"{NOTICE}\n")
    assert run("chat", stdin=b"What?\nWhere?\n") == (0, f"{TEXT}\n" * 2, f"{NOTICE}\n")
    status, out, err = run("point", image, "mug")
    assert (status, err) == (1, f"{NOTICE}\n")
    assert "the answer has no point" in out
    status, out, err = run("watch", image.parent, "What?")
    assert (status, err) == (0, f"{NOTICE}\n")
    assert out.endswith(f"{TEXT}\n")


def test_with_json_the_notice_is_a_field(run: Run, image: Path) -> None:
    _, out, err = run("count", image, "mugs", "--json")
    assert json.loads(out)["notice"] == NOTICE
    assert json.loads(out)["environment"]["model"] == "stub"
    assert err == ""


def test_the_command_answers_from_a_shell(image: Path, cache_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "molmo_edge", "ask", str(image), "What is it?"],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "MOLMO_EDGE_CACHE_DIR": str(cache_dir), "MOLMO_EDGE_MODEL": "stub"},
    )
    assert (done.returncode, done.stdout) == (0, f"{TEXT}\n")
    assert NOTICE in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
