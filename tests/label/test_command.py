"""The command line of `molmo-edge label`: what it hands over, and its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import molmo_edge.label
from molmo_edge.cli.app import main
from molmo_edge.label import Progress, Source


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of `label`, which is replaced."""
    given: dict[str, Any] = {}

    def label(source: Source, out: Path, tasks: Any, **options: Any) -> Progress:
        given.update(source=source, out=out, tasks=tasks, **options)
        return Progress(total=3, before=1, done=3, errors=1, seconds=4.0)

    monkeypatch.setattr(molmo_edge.label, "label", label)
    return given


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["label", *arguments])
    return int(ended.value.code or 0)


def test_options_are_tasks(
    called: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks.toml").write_text(
        '[[task]]\nname = "scene"\nask = "What?"\njson_schema = "scene.json"\n'
    )
    (tmp_path / "scene.json").write_text('{"type": "object", "description": "Say it."}')
    assert 0 == run(
        "a", "b", "--out", "out", "--caption", "long", "--point", "mug=red mug", "--count", "x y",
        "--ask", "is 2 = 3?", "--choose", "open=Is it 1:30?:Yes, No", "--flush", "10s",
        "--tasks", str(tmp_path / "tasks.toml"), "--json-schema", str(tmp_path / "scene.json"),
        "--id-column", "id", "--model", "stub", "--max-tokens", "9", "--limit", "5", "--json",
    )  # fmt: skip
    schema = {"type": "object", "description": "Say it."}
    assert called["tasks"] == [
        {"caption": "long"},
        {"name": "mug", "point": "red mug"},
        {"count": "x y"},
        {"ask": "is 2 = 3?"},
        {"name": "open", "choose": "Is it 1:30?", "choices": ("Yes", "No")},
        {"name": "scene", "ask": "What?", "json_schema": schema},
        {"name": "scene", "ask": "Say it.", "json_schema": schema},
    ]
    assert called["source"] == Source(("a", "b"), None, "id") and called["flush_s"] == 10.0
    assert called["engine"] == {"model": "stub"} and called["max_tokens"] == 9
    assert called["limit"] == 5 and not called["ray"]
    said = capsys.readouterr()
    assert json.loads(said.out)["rows_per_s"] == 0.5 and json.loads(said.out)["errors"] == 1
    assert "random weights" in " ".join(said.err.split()) and "column error" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--flush", "soon"), "--flush: give a number"),
        (("--flush", "0"), "--flush: give a number"),
        (("--choose", "Is it open?"), "answers follow the question"),
        (("--tasks", "/none.toml"), "no TOML file"),
        (("--json-schema", "/none.json"), "no JSON file"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("photos", "--out", "out", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
