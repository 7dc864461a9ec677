"""Every verb of the command line on the real engine and the stub, which says that it is one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.cli import common
from molmo_edge.cli.app import main
from molmo_edge.models.molmo.stub import NOTICE, TEXT

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


class Kept:
    """An engine that outlives the command it is lent to."""

    def __init__(self, vlm: EdgeVLM) -> None:
        self._vlm = vlm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlm, name)

    def __enter__(self) -> EdgeVLM:
        return self._vlm

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.fixture
def picture(tmp_path: Path, photo: np.ndarray) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    return path


@pytest.fixture
def run(
    stub_vlm: EdgeVLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr(common, "make_vlm", lambda *args, **settings: Kept(stub_vlm))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object, stdin: bytes | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_every_verb_answers_and_names_the_stub(
    run: Callable[..., tuple[int, str, str]], picture: Path
) -> None:
    asking = ("ask", picture, "What is it?")
    assert run(*asking) == (0, f"{TEXT}\n", f"{NOTICE}\n")
    assert run("ask", "-", "What?", stdin=picture.read_bytes())[:2] == (0, f"{TEXT}\n")
    assert run("caption", picture)[1:] == (f"{TEXT}\n", f"{NOTICE}\n")
    status, out, err = run("chat", stdin=f"/image {picture}\nWhat?\nWhere?\n".encode())
    assert (status, out, err) == (0, f"{TEXT}\n" * 2, f"{NOTICE}\n")
    status, out, err = run("point", picture, "mug")
    assert (status, err) == (1, f"{NOTICE}\n")
    assert "the answer has no point" in out
    assert run("count", picture, "mugs")[0] == 1
    status, out, err = run("watch", picture.parent, "What?")
    assert (status, err) == (0, f"{NOTICE}\n")
    assert out.endswith(f"{TEXT}\n")


def test_with_json_the_notice_is_a_field(
    run: Callable[..., tuple[int, str, str]], picture: Path
) -> None:
    for arguments in (
        ("ask", picture, "What?"),
        ("caption", picture),
        ("point", picture, "mug"),
        ("count", picture, "mugs"),
    ):
        _, out, err = run(*arguments, "--json")
        assert json.loads(out)["notice"] == NOTICE
        assert json.loads(out)["environment"]["model"] == "stub"
        assert err == ""
    _, out, _ = run("watch", picture.parent, "What?", "--json")
    assert json.loads(out)["notice"] == NOTICE


def test_the_command_answers_from_a_shell(picture: Path, cache_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "molmo_edge", "ask", str(picture), "What is it?"],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "MOLMO_EDGE_CACHE_DIR": str(cache_dir), "MOLMO_EDGE_MODEL": "stub"},
    )
    assert (done.returncode, done.stdout) == (0, f"{TEXT}\n")
    assert NOTICE in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
