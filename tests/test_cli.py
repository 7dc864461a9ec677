"""The command line over a fake engine: what it prints where, and its exit statuses."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import molmo_edge
from molmo_edge import EdgeVLM
from molmo_edge.bench.scenes import Scene, Shape
from molmo_edge.cli import common, verbs
from molmo_edge.cli.app import main
from molmo_edge.engine.fake import FakeFactory
from molmo_edge.models.hub import DEMO, DEMO_DIRECTORY, NOTICES, STUBS
from molmo_edge.video import VideoLimits, load_video, write_video

MUG = '<point x="61.5" y="40.4" alt="mug">mug</point>'
ANSWERS = {
    "What is it?": "A cup.",
    "Is it open?": "yes",
    "Point to mug": MUG,
    "Point to unicorn": "There are none.",
    "How many mugs are there?": f"Counting the {MUG} shows a total of 1.",
    "How many ideas are there?": "Hard to tell.",
    "Point to cups": '<points coords="1 1 100 200;2 2 300 400">cups</points>',
    "How many cups are there?": '<points coords="0.5 1 100 200;1.0 2 300 400">cups</points>',
    "Track cups.": '<tracks coords="0.0 1 100 200;0.5 1 110 210">cups</tracks>',
    "Track unicorns.": "No tracks available.",
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
    def json_lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Ended]


@pytest.fixture
def built() -> list[dict[str, Any]]:
    """What engines were built with."""
    return []


@pytest.fixture
def run(
    fake: FakeFactory,
    built: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    def make(model: str | None, **settings: Any) -> EdgeVLM:
        built.append({"model": model, **settings})
        return EdgeVLM(model, engine=fake, **settings)

    monkeypatch.setattr(molmo_edge, "EdgeVLM", make, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object, stdin: bytes | None = None) -> Ended:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        captured = capsys.readouterr()
        # What is going on is printed on standard error, which is no terminal.
        err = "".join(line for line in captured.err.splitlines(True) if not line.endswith("…\n"))
        return Ended(int(ended.value.code or 0), captured.out, err)

    return call


@pytest.fixture
def image(tmp_path: Path, photo: np.ndarray) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    return path


@pytest.fixture
def video(tmp_path: Path, photo: np.ndarray) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(path, [photo] * 5, fps=4.0)
    return path


def test_ask_prints_the_answer_alone_on_standard_output(run: Run, image: Path) -> None:
    ended = run("ask", image, "What is it?")
    assert (ended.status, ended.out, ended.err) == (0, "A cup.\n", "")
    # An answer is never interpreted as markup.
    assert run("ask", image, "Else?").out == "Something [bold]else[/bold].\n"


def test_choose_prints_probabilities_and_ends_with_0_for_the_first_choice(
    run: Run, image: Path, built: list[dict[str, Any]]
) -> None:
    ended = run("choose", image, "Is it open?", "yes", "no")
    assert (ended.status, ended.err) == (0, "")
    for part in ("yes", "0.99", "no", "0.00", "other answers"):
        assert part in ended.out
    ended = run("choose", "Is it open?", "no", "yes", "--image", image, "--json")
    assert (ended.status, ended.json["choice"]) == (1, "yes")
    assert list(ended.json["probabilities"]) == ["no", "yes"]
    assert ended.json["metrics"]["image_tokens"] == 144
    built.clear()
    assert run("choose", image, "Is it open?", "yes").status == 2
    assert built == []


def test_ask_reads_an_image_from_standard_input(run: Run, image: Path) -> None:
    assert run("ask", "-", "What is it?", stdin=image.read_bytes()).out == "A cup.\n"
    empty = run("ask", "-", "What is it?", stdin=b"")
    assert (empty.status, empty.out) == (2, "")
    assert "standard input has no image" in empty.err


def test_a_tilde_is_the_home_directory(
    run: Run, image: Path, video: Path, golden_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(image.parent))
    assert run("ask", "~/photo.png", "What is it?").out == "A cup.\n"
    assert run("ask", "What is it?", "--video=~/clip.mp4").out == "A cup.\n"
    assert run("point", "~/photo.png", "mug").status == 0
    assert len(run("watch", "~/photo.png", "What is it?").out.splitlines()) == 1
    (image.parent / "molmo").symlink_to(golden_checkpoint("qwen3"))
    plan = run("plan", "--model=~/molmo", "--device", "thor", "--json")
    assert plan.json["notes"] and "computed from" not in str(plan.json["notes"])


def test_several_images_or_a_video_stand_in_options(run: Run, image: Path, video: Path) -> None:
    two = ("--image", image, "--image", image)
    assert run("ask", "What is it?", *two, "--json").json["metrics"]["image_tokens"] == 2 * 144
    assert run("ask", "What is it?", "--video", video).out == "A cup.\n"
    assert run("point", "cups", *two).out.splitlines() == [
        "1 cups: image 1, x 0.100, y 0.200, pixel 12, 18",
        "2 cups: image 2, x 0.300, y 0.400, pixel 36, 36",
    ]
    assert run("count", "cups", "--video", video).out == "2 (by its points)\n"
    for wrong in (
        ("ask", "What is it?", *two, "--video", video),
        ("ask", image, "What is it?", *two),
        ("count", "cups", "mugs", *two),
        ("point", *two),
    ):
        assert run(*wrong).status == 2
    missing = run("ask", "What is it?", "--video", "missing.mp4")
    assert (missing.status, "missing.mp4" in missing.err) == (2, True)


def test_each_image_and_each_frame_with_a_point_is_drawn(
    run: Run, image: Path, video: Path, tmp_path: Path
) -> None:
    names = [str(tmp_path / f"marked-{number}.png") for number in (1, 2)]
    command = ("point", "cups", "--draw", tmp_path / "marked.png", "--json")
    assert run(*command, "--image", image, "--image", image).json["drawn"] == names
    answer = run(*command, "--video", video).json
    # Times 1 and 2 of a clip that ends after one and a bit: frames 2 and 3.
    assert [one["frame"] for one in answer["labels"][0]["points"]] == [2, 3]
    assert [Path(name).name for name in answer["drawn"]] == ["marked-3.png", "marked-4.png"]
    assert all(Path(name).is_file() for name in answer["drawn"])


def test_track_prints_positions_and_draws_them(run: Run, video: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "marked.mp4"
    ended = run("track", video, "cups", "--draw", drawn)
    assert ended.out.splitlines() == [
        "1 cups: 0.0 s, x 0.100, y 0.200",
        "1 cups: 0.5 s, x 0.110, y 0.210",
    ]
    clip = load_video(drawn, VideoLimits())
    assert clip.size == (120, 90)
    dot = clip.frames[0][18, 12].astype(int)
    assert dot[0] > 200 and dot[1] < 90  # the first colour
    assert run("track", video, "cups", "--json").json["tracks"]["1"][1]["time_s"] == 0.5
    none = run("track", video, "unicorns")
    assert (none.status, none.out) == (1, "unicorns: none found\n")
    assert run("track", video, "cups", "--draw", "marked.png").status == 2


def test_json_holds_answer_metrics_and_environment(run: Run, image: Path) -> None:
    answer = run("ask", image, "What is it?", "--json").json
    assert (answer["text"], answer["finish_reason"], answer["notice"]) == ("A cup.", "stop", None)
    assert answer["metrics"]["output_tokens"] == 3
    assert answer["environment"]["model"] == "fake"
    assert run("caption", "--length", "long", image, "--json").json["text"].startswith("Something")


def test_options_reach_the_engine(
    run: Run, image: Path, tmp_path: Path, built: list[dict[str, Any]]
) -> None:
    config = tmp_path / "edge.toml"
    config.write_text("max_queue = 7\n")
    ended = run(
        "caption", image, "--max-tokens", "1", "--model", "local", "--config", config,
        "--max-crops", "3",
    )  # fmt: skip
    assert ended.out == "Something\n"
    assert "cut off" in ended.err
    assert built == [{"model": "local", "config": config, "max_crops": 3}]


def test_a_schema_file_makes_the_answer_json(
    run: Run, image: Path, tmp_path: Path, fake: FakeFactory
) -> None:
    fake.answers = '{"open": true}'
    schema = tmp_path / "door.json"
    schema.write_text('{"type": "object"}')
    assert run("ask", image, "?", "--schema", schema, "--json").json["parsed"] == {"open": True}
    for wrong in ("{", "[" * 100_000):
        schema.write_text(wrong)
        ended = run("ask", image, "?", "--schema", schema)
        assert ended.status == 2 and "--schema" in ended.err


def test_a_built_in_model_is_named_beside_its_answers(
    run: Run, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "NOTICES", {"fake": NOTICES[DEMO]})
    for command in (["ask", image, "?"], ["caption", image], ["point", image, "mug"],
                    ["chat"], ["watch", image, "?"]):  # fmt: skip
        assert run(*command, stdin=b"What?").err == f"{NOTICES[DEMO]}\n"
    ended = run("count", image, "mugs", "--json")
    assert (ended.json["notice"], ended.err) == (NOTICES[DEMO], "")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_shell_gets_true_points_of_the_demo(tmp_path: Path) -> None:
    image, drawn = tmp_path / "scene.png", tmp_path / "drawn.png"
    circle = Shape("circle", "red", 0.25, 0.5, 0.2, 0.0, (220, 20, 30))
    Scene((circle,)).draw().save(image)
    done = subprocess.run(
        [sys.executable, "-m", "molmo_edge", "point", image, "red circle", "--draw", drawn],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "MOLMO_EDGE_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    numbers = re.fullmatch(r"1 red circle: x (\S+), y (\S+), pixel \d+, \d+", line)
    assert numbers and [float(n) for n in numbers.groups()] == pytest.approx([0.25, 0.5], abs=0.03)
    assert NOTICES[DEMO] in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    # Nothing was copied: at most the compiled kernels are there.
    assert {path.name for path in tmp_path.glob("cache/*")} <= {"compiled"}
    with Image.open(drawn) as marked:
        assert marked.size == (320, 240)


def test_point_prints_places_and_draws_them(run: Run, image: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "marked.png"
    ended = run("point", image, "Mug", "unicorn", "--draw", drawn)
    assert ended.status == 0
    assert ended.out.splitlines() == [
        "1 mug: x 0.615, y 0.404, pixel 73, 36",
        "unicorn: none found",
    ]
    with Image.open(drawn) as marked:
        assert marked.size == (120, 90)
    answer = run("point", image, "mug", "unicorn", "--json").json
    assert answer["size"] == [120, 90]
    assert [one["label"] for one in answer["labels"]] == ["mug", "unicorn"]
    assert answer["labels"][0]["points"][0]["px"] == [73, 36]
    assert answer["labels"][1]["none_found"]
    assert run("point", image, "unicorn").status == 1


def test_count_prints_a_number_and_how_it_is_known(run: Run, image: Path) -> None:
    ended = run("count", image, "mugs")
    assert (ended.status, ended.out) == (0, "1 (by its points)\n")
    answer = run("count", image, "mugs", "--json").json
    assert (answer["number"], answer["how"], answer["consistent"]) == (1, "points", True)
    assert answer["points"]["points"][0]["px"] == [73, 36]
    assert run("count", image, "ideas").status == 1


def test_a_drawing_that_cannot_be_written_is_an_error(
    run: Run, image: Path, built: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "directory.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name in (
        "marked.txt", "missing/marked.png", "directory.png", tmp_path / "loop.png",
        "x" * 300 + ".png",
    ):  # fmt: skip
        ended = run("point", image, "mug", "--draw", name)
        assert ended.status == 2 and "--draw" in ended.err
    assert built == []


def test_chat_answers_each_line_of_a_pipe(run: Run, image: Path, fake: FakeFactory) -> None:
    lines = f"/image {image}\nWhat is it?\n\nWhere?\n/new\nWhat is it?\n"
    ended = run("chat", stdin=lines.encode())
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines() == ["A cup.", "Something [bold]else[/bold].", "A cup."]
    assert fake.engine.prompts == ["What is it?", "Where?", "What is it?"]
    answers = run("chat", "--image", image, "--json", stdin=b"What is it?\nWhere?\n").json_lines
    assert [one["text"] for one in answers] == ["A cup.", "Something [bold]else[/bold]."]


def test_chat_goes_on_after_a_line_that_cannot_be_answered(run: Run) -> None:
    ended = run("chat", stdin=b"/image missing.png\n<|endoftext|>\nWhat is it?\n/help\n")
    assert (ended.status, ended.out) == (2, "A cup.\n")
    for part in ("ImageError", "PromptError", "/image PATH"):
        assert part in ended.err


def test_ctrl_c_during_an_answer_stops_the_answer_not_the_session(
    run: Run, monkeypatch: pytest.MonkeyPatch, fake: FakeFactory
) -> None:
    lines = iter(["Else?", "What is it?"])
    write = verbs.write

    def interrupted(text: str) -> None:
        if text.startswith("Something"):
            raise KeyboardInterrupt
        write(text)

    monkeypatch.setattr(verbs, "write", interrupted)
    monkeypatch.setattr(verbs, "_lines", lambda: lines)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    ended = run("chat")
    assert (ended.status, ended.out, ended.err) == (0, "\nA cup.\n", "stopped\n")
    assert fake.engine.prompts == ["Else?", "What is it?"]


@pytest.mark.parametrize("command", ["profiles", "--help", "config show --json"])
@pytest.mark.parametrize("target", ["> /dev/full", ">&-"])
def test_output_that_cannot_be_written_is_exit_status_2_and_one_line(
    command: str, target: str
) -> None:
    shell = f"exec {sys.executable} -m molmo_edge {command} {target}"
    ended = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("OSError: ") and len(ended.stderr.splitlines()) == 1


def test_watch_answers_each_image_of_a_directory(
    run: Run, tmp_path: Path, photo: np.ndarray
) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(photo).save(frames / name)
    (frames / "d.png").write_bytes(b"broken")
    seen = run("watch", frames, "What is it?", "--json").json_lines
    assert [one["text"] for one in seen] == ["A cup.", "A cup.", "A cup.", None]
    assert seen[3]["error"].startswith("ImageError")
    assert all(one["latency_s"] > 0 for one in seen)
    command = ("watch", frames, "What is it?", "--frames", 2, "--window", 2)
    lines = run(*command).out.splitlines()
    assert len(lines) == 2 and lines[0].endswith(": A cup.")
    for option, label, shown in (
        ("--point", "mug", "1 mug: x 0.615, y 0.404, pixel 73, 36"),
        ("--count", "mugs", "1 (by its points)"),
    ):
        command = ("watch", frames, option, label, "--frames", 1)
        assert run(*command).out.endswith(f": {shown}\n")
        assert run(*command, "--json").json["points"]["points"][0]["px"] == [73, 36]


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "missing.png", "What?"],
        ["ask", "https://example.com/a.png", "What?"],
        ["plan", "--model", "no/such/model"],
        ["plan", "--model", "allenai/Molmo-7B-D-0924", "--device", "abacus"],
        ["plan", "--profile", "abacus"],
        ["plan", "--profile", "thor"],
        ["plan", "--config", "missing.toml"],
        ["fetch", "no such/model"],
        ["quantize", "no/such/model", "out", "--scheme", "fp8"],
        ["verify", "--model", "no/such/model"],
        ["config", "show", "--config", "missing.toml"],
        ["watch", "file:///x"],
        ["watch", "missing.mp4"],
        ["watch", "x" * 300],
        ["ask", "What?", "--video", "x" * 300],
        ["watch", "0", "--max-fps=0"],
    ],
)
def test_our_errors_are_exit_status_2_and_a_line_without_a_traceback(
    run: Run, arguments: list[str], built: list[dict[str, Any]]
) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert "Error: " in ended.err.splitlines()[0]
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) <= 2
    assert built == []


def test_a_failed_start_is_reported_with_its_cause_and_ctrl_c_is_130(
    run: Run, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> Any:
        raise RuntimeError("no kernel image")

    def interrupt(*args: Any, **settings: Any) -> EdgeVLM:
        raise KeyboardInterrupt

    monkeypatch.setattr(molmo_edge, "EdgeVLM", lambda *args, **settings: EdgeVLM(engine=build))
    ended = run("ask", image, "What?")
    assert ended.status == 2
    assert ended.err.startswith("EngineStartError: ")
    assert "caused by RuntimeError: no kernel image" in ended.err
    monkeypatch.setattr(molmo_edge, "EdgeVLM", interrupt)
    assert run("ask", image, "What?").status == 130


@pytest.mark.parametrize(
    "arguments",
    [["ask", "x.png"], ["ask", "x.png", "What?", "--colour"],
     ["caption", "x.png", "--length", "endless"], ["nonsense"], ["bench", "--scenario", "abacus"]],
)  # fmt: skip
def test_wrong_usage_is_exit_status_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments).status == 2


@pytest.mark.parametrize(
    "command",
    ["ask", "choose", "caption", "chat", "point", "count", "track", "watch", "verify", "doctor",
     "plan", "profiles", "config show", "warmup", "fetch", "quantize"],
)  # fmt: skip
def test_every_command_helps_with_examples(run: Run, command: str) -> None:
    ended = run(*command.split(), "--help")
    assert ended.status == 0
    for part in ("Examples:", f"molmo-edge {command}", "--json"):
        assert part in ended.out


def test_the_commands_about_the_machine_answer(
    run: Run, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = run("profiles", "--json").json
    assert profiles["chosen"] in [one["name"] for one in profiles["profiles"]]
    assert "thor" in run("profiles").out
    plan = ("plan", "--device", "thor", "--model", "allenai/Molmo2-4B", "--json")
    rows = run(*plan).json["rows"]
    half = run(*plan, "--bandwidth", "136.5").json["rows"]
    assert half[0]["decode_tps"] == pytest.approx(rows[0]["decode_tps"] / 2)
    assert "tok/s" in run("plan", "--model", "allenai/Molmo-7B-D-0924", "--device", "thor").out
    monkeypatch.setenv("MOLMO_EDGE_CACHE_DIR", str(cache_dir))
    monkeypatch.setenv("MOLMO_EDGE_KV_CACHE_DTYPE", "auto")
    demo = run("plan", "--device", "thor", "--json").json
    assert (demo["model"], demo["rows"] != [], demo["kv_cache_dtype"]) == ("demo", True, "bfloat16")
    assert run("fetch", DEMO).out.strip() == str(DEMO_DIRECTORY)
    assert run("fetch", "stub").out.strip() == str(cache_dir / STUBS["stub"])
    diagnosis = run("doctor", "--json")
    assert diagnosis.status == (0 if diagnosis.json["healthy"] else 1)
    assert "Profile" in run("doctor").out
    assert run("--version").out.startswith("molmo_edge ")


def test_config_show_names_the_source_of_each_setting(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLMO_EDGE_MAX_CROPS", "4")
    rows = run("config", "show", "--model", "local", "--json").json["settings"]
    assert rows["max_crops"] == {"value": 4, "origin": "environment"}
    assert rows["model"] == {"value": "local", "origin": "argument"}
    lines = [line.split() for line in run("config", "show").out.replace("│", " ").splitlines()]
    assert ["max_crops", "4", "environment"] in lines


def test_warmup_reports_what_it_ran(run: Run) -> None:
    assert "decode, tok/s:" in run("warmup", "--tokens", 2, "--rounds", 2).out
    report = run("warmup", "--tokens", 2, "--rounds", 2, "--json").json
    assert report["steps"] and report["environment"]["model"] == "fake"
