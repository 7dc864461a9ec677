"""The command line over a fake engine: what it prints where, and its exit statuses."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.cli import common
from molmo_edge.cli.app import main
from molmo_edge.engine.fake import FakeEngine, FakeFactory

MUG = '<point x="61.5" y="40.4" alt="mug">mug</point>'
ANSWERS = {
    "What is it?": "A cup.",
    "Point to mug": MUG,
    "Point to unicorn": "There are none.",
    "How many mugs are there?": f"Counting the {MUG} shows a total of 1.",
    "How many ideas are there?": "Hard to tell.",
    "": "Something [bold]else[/bold].",
}


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def fake() -> FakeFactory:
    return FakeEngine.factory(ANSWERS)


@pytest.fixture
def asked() -> list[dict[str, Any]]:
    """What the engine was built with."""
    return []


@pytest.fixture
def run(
    fake: FakeFactory,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Ended]:
    def make(model: str | None, config: Path | None, **settings: Any) -> EdgeVLM:
        asked.append({"model": model, "config": config, **settings})
        return EdgeVLM(model, config=config, engine=fake, **settings)

    monkeypatch.setattr(common, "make_vlm", make)

    def call(*arguments: object, stdin: bytes | None = None) -> Ended:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        code = ended.value.code
        said = capsys.readouterr()
        return Ended(code if isinstance(code, int) else 0, said.out, said.err)

    return call


@pytest.fixture
def picture(tmp_path: Path, photo: np.ndarray) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    return path


def test_ask_prints_the_answer_alone_on_standard_output(
    run: Callable[..., Ended], picture: Path
) -> None:
    ended = run("ask", picture, "What is it?")
    assert (ended.status, ended.out, ended.err) == (0, "A cup.\n", "")
    # What a model says is never taken for markup.
    assert run("ask", picture, "Else?").out == "Something [bold]else[/bold].\n"


def test_ask_reads_a_picture_from_standard_input(
    run: Callable[..., Ended], picture: Path
) -> None:
    assert run("ask", "-", "What is it?", stdin=picture.read_bytes()).out == "A cup.\n"
    empty = run("ask", "-", "What is it?", stdin=b"")
    assert (empty.status, empty.out) == (2, "")
    assert "standard input holds no picture" in empty.err


def test_json_holds_answer_metrics_and_environment(
    run: Callable[..., Ended], picture: Path
) -> None:
    told = run("ask", picture, "What is it?", "--json").json
    assert (told["text"], told["finish_reason"], told["notice"]) == ("A cup.", "stop", None)
    assert told["metrics"]["output_tokens"] == 3
    assert told["environment"]["model"] == "fake"
    for command in (["caption"], ["caption", "--length", "long"]):
        assert run(*command, picture, "--json").json["text"].startswith("Something")


def test_options_reach_the_engine(
    run: Callable[..., Ended], picture: Path, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    config = tmp_path / "edge.toml"
    config.write_text("max_queue = 7\n")
    ended = run(
        "ask", picture, "What is it?", "--max-tokens", "1", "--model", "here", "--config", config,
        "--max-crops", "3",
    )  # fmt: skip
    assert ended.out == "A\n"
    assert "cut off" in ended.err
    assert asked == [{"model": "here", "config": config, "max_crops": 3}]


def test_a_schema_file_makes_the_answer_json(
    run: Callable[..., Ended], picture: Path, tmp_path: Path, fake: FakeFactory
) -> None:
    fake._answers = '{"open": true}'
    schema = tmp_path / "door.json"
    schema.write_text('{"type": "object"}')
    assert run("ask", picture, "?", "--schema", schema, "--json").json["parsed"] == {"open": True}
    schema.write_text("{")
    assert "--schema" in run("ask", picture, "?", "--schema", schema).err


def test_the_stub_says_what_it_is(
    run: Callable[..., Ended], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "notice", lambda vlm: "This is the stub.")
    for module in ("ask", "point"):
        monkeypatch.setattr(f"molmo_edge.cli.{module}.notice", lambda vlm: "This is the stub.")
    ended = run("ask", picture, "What is it?")
    assert (ended.out, ended.err) == ("A cup.\n", "This is the stub.\n")
    ended = run("point", picture, "mug", "--json")
    assert ended.json["notice"] == "This is the stub."
    assert ended.err == ""


def test_point_prints_places_and_draws_them(
    run: Callable[..., Ended], picture: Path, tmp_path: Path
) -> None:
    drawn = tmp_path / "marked.png"
    ended = run("point", picture, "Mug", "unicorn", "--draw", drawn)
    assert ended.status == 0
    assert "73, 36" in ended.out
    assert "unicorn: none found" in ended.out
    with Image.open(drawn) as marked:
        assert marked.size == (120, 90)
    told = run("point", picture, "mug", "unicorn", "--json").json
    assert told["size"] == [120, 90]
    assert [one["label"] for one in told["labels"]] == ["mug", "unicorn"]
    assert told["labels"][0]["points"][0]["px"] == [73, 36]
    assert told["labels"][1]["none_found"]


def test_finding_nothing_is_exit_status_1(run: Callable[..., Ended], picture: Path) -> None:
    assert run("point", picture, "unicorn").status == 1
    assert run("point", picture, "unicorn", "--json").status == 1
    assert run("count", picture, "ideas").status == 1


def test_count_prints_a_number_and_how_it_is_known(
    run: Callable[..., Ended], picture: Path
) -> None:
    ended = run("count", picture, "mugs")
    assert (ended.status, ended.out) == (0, "1 (by its points)\n")
    told = run("count", picture, "mugs", "--json").json
    assert (told["number"], told["how"], told["consistent"]) == (1, "points", True)
    assert told["points"]["points"][0]["px"] == [73, 36]


@pytest.mark.parametrize("name", ["marked.txt", "missing/marked.png"])
def test_a_drawing_that_cannot_be_written_is_told_before_the_engine_starts(
    run: Callable[..., Ended], picture: Path, name: str, asked: list[dict[str, Any]]
) -> None:
    ended = run("point", picture, "mug", "--draw", name)
    assert ended.status == 2
    assert "--draw" in ended.err
    assert asked == []


def test_chat_answers_each_line_of_a_pipe(
    run: Callable[..., Ended], picture: Path, fake: FakeFactory
) -> None:
    lines = f"/image {picture}\nWhat is it?\n\nWhere?\n/new\nWhat is it?\n/quit\nnever\n"
    ended = run("chat", stdin=lines.encode())
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines() == ["A cup.", "Something [bold]else[/bold].", "A cup."]
    assert fake.engine.prompts == ["What is it?", "Where?", "What is it?"]
    told = run("chat", "--image", picture, "--json", stdin=b"What is it?\nWhere?\n").lines
    assert [one["text"] for one in told] == ["A cup.", "Something [bold]else[/bold]."]


def test_chat_goes_on_after_a_line_that_cannot_be_answered(
    run: Callable[..., Ended], picture: Path
) -> None:
    lines = b"/image missing.png\n<|endoftext|>\nWhat is it?\n/help\n"
    ended = run("chat", stdin=lines)
    assert ended.status == 2
    assert ended.out == "A cup.\n"
    assert "ImageError" in ended.err
    assert "PromptError" in ended.err
    assert "/image PATH" in ended.err


def test_watch_answers_each_picture_of_a_folder(
    run: Callable[..., Ended], tmp_path: Path, photo: np.ndarray
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(photo).save(folder / name)
    (folder / "d.png").write_bytes(b"broken")
    told = run("watch", folder, "What is it?", "--json").lines
    assert [one["text"] for one in told] == ["A cup.", "A cup.", "A cup.", None]
    assert told[3]["error"].startswith("ImageError")
    assert all(one["latency_s"] > 0 for one in told)
    ended = run("watch", folder, "What is it?", "--frames", 2)
    assert len(ended.out.splitlines()) == 2
    assert ended.out.splitlines()[0].endswith(": A cup.")


@pytest.mark.parametrize(
    "arguments",
    [["watch", "rtsp://x"], ["watch", "missing.mp4"], ["watch", ""], ["watch", "0", "--max-fps=0"]],
)
def test_sources_that_cannot_be_watched_are_one_line(
    run: Callable[..., Ended], arguments: list[str]
) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.splitlines()[0].startswith(("ConfigError", "CameraError"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "missing.png", "What?"],
        ["ask", "https://example.com/a.png", "What?"],
        ["caption", "."],
        ["plan", "--model", "no/such/model"],
        ["plan", "--model", "allenai/Molmo-7B-D-0924", "--device", "abacus"],
        ["doctor", "--profile", "abacus"],
        ["config", "show", "--config", "missing.toml"],
    ],
)
def test_errors_of_ours_are_exit_status_2_without_a_traceback(
    run: Callable[..., Ended], arguments: list[str], asked: list[dict[str, Any]]
) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert "Error: " in ended.err.splitlines()[0]
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) <= 2
    assert asked == []


def test_a_dead_engine_is_told_with_its_cause(
    run: Callable[..., Ended], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **settings: Any) -> EdgeVLM:
        def build() -> Any:
            raise RuntimeError("no kernel image")

        return EdgeVLM(engine=build)

    monkeypatch.setattr(common, "make_vlm", broken)
    ended = run("ask", picture, "What?")
    assert ended.status == 2
    assert ended.err.startswith("EngineStartError: ")
    assert "caused by RuntimeError: no kernel image" in ended.err


def test_ctrl_c_is_exit_status_130(
    run: Callable[..., Ended], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **settings: Any) -> EdgeVLM:
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "make_vlm", interrupted)
    assert run("ask", picture, "What?").status == 130


def test_wrong_usage_is_exit_status_2(run: Callable[..., Ended], picture: Path) -> None:
    assert run("ask", picture).status == 2
    assert run("ask", picture, "What?", "--colour").status == 2
    assert run("nonsense").status == 2
    assert run("caption", picture, "--length", "endless").status == 2


COMMANDS = [
    "ask", "caption", "chat", "point", "count", "watch", "verify", "doctor", "plan", "profiles",
    "config show", "warmup",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_examples(run: Callable[..., Ended], command: str) -> None:
    ended = run(*command.split(), "--help")
    assert ended.status == 0
    assert "Examples:" in ended.out
    assert f"molmo-edge {command}" in ended.out
    assert "--json" in ended.out


def test_the_commands_about_the_machine_answer(run: Callable[..., Ended]) -> None:
    told = run("profiles", "--json").json
    assert told["chosen"] in [one["name"] for one in told["profiles"]]
    assert "thor" in run("profiles").out
    assert run("plan", "--device", "thor", "--json").json["rows"]
    assert "tok/s" in run("plan", "--model", "allenai/Molmo-7B-D-0924", "--device", "thor").out
    diagnosis = run("doctor", "--json")
    assert diagnosis.status == (0 if diagnosis.json["healthy"] else 1)
    assert "Profile" in run("doctor").out


def test_config_show_names_the_source_of_each_setting(
    run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLMO_EDGE_MAX_CROPS", "4")
    told = run("config", "show", "--model", "here", "--json").json["settings"]
    assert told["max_crops"] == {"value": 4, "origin": "environment MOLMO_EDGE_MAX_CROPS"}
    assert told["model"] == {"value": "here", "origin": "argument"}
    assert "MOLMO_EDGE_MAX_CROPS" in run("config", "show").out.replace("\n", "")


def test_bench_gets_its_own_options(run: Callable[..., Ended]) -> None:
    ended = run("bench", "--help")
    assert ended.status == 0
    assert "molmo-edge bench" in ended.out
    assert "--scenario" in ended.out
    assert run("bench", "--scenario", "abacus").status == 2


def test_warmup_says_what_it_ran(run: Callable[..., Ended]) -> None:
    ended = run("warmup", "--tokens", 2, "--rounds", 2)
    assert ended.status == 0
    assert "decode, tok/s:" in ended.out
    told = run("warmup", "--tokens", 2, "--rounds", 2, "--json").json
    assert told["steps"]
    assert told["environment"]["model"] == "fake"


def test_the_version_names_what_answers_depend_on(run: Callable[..., Ended]) -> None:
    assert run("--version").out.startswith("molmo_edge ")


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "200")
    yield
