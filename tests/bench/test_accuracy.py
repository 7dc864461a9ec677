"""Accuracy: what is asked follows from the seed, and answers score what they are worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from molmo_edge import EdgeVLM
from molmo_edge.bench import accuracy
from molmo_edge.bench.accuracy import GOALS, MEASURES, Accuracy, Question, evaluate, questions
from molmo_edge.bench.environment import Target
from molmo_edge.bench.scenes import COLORS
from molmo_edge.cli import bench as cli
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import ImageError
from molmo_edge.interface import PROMPTS, Turn
from molmo_edge.models.gemma3 import Gemma3
from molmo_edge.requests import Request

# Few scenes with all kinds of questions, counts of more than four too.
SCENES, SEED = 6, 10


@cache
def asked() -> list[Question]:
    return list(questions(SCENES, SEED))


def coords(tag: str, numbers: Sequence[float], places: Sequence[Any], shift: float) -> str:
    """Points as Molmo 2 writes them, shifted to the right by a fraction of the width."""
    frames, id = [], 0
    for number, (_, centres) in zip(numbers, places, strict=True):
        frames.append(f"{number}")
        for x, y in centres:
            id = 1 if tag == "tracks" else id + 1
            x = x + shift if x < 0.5 else x - shift
            frames[-1] += f" {id} {round(1000 * x):03} {round(1000 * y):03}"
    return f'<{tag} coords="{";".join(f for f in frames if " " in f)}">those</{tag}>'


def truth(question: Question, shift: float = 0.0) -> str:
    """The right answer in the words of a model."""
    right = question.right
    if question.measure.startswith("points"):
        return coords("points", range(1, len(right) + 1), right, shift)
    if question.measure == "track":
        return coords("tracks", accuracy.TIMES, right, shift)
    if question.measure == "caption":
        return f"There is {' and '.join(f'a {color} {kind}' for color, kind in sorted(right))}."
    answers = {"yes": "Yes, there is.", "no": "No.", 0: "There are none.", None: "There are none."}
    return answers.get(right, f"{right}.")


def seen(turn: Turn) -> tuple[str, tuple[bytes, ...]]:
    """What tells questions apart."""
    images = turn.images if turn.video is None else turn.video.frames
    return turn.text, tuple(np.asarray(image).tobytes() for image in images)


def engine(answer: Callable[[Question], str] = truth) -> EdgeVLM:
    """A model that answers every question of the evaluation."""
    answers = {}
    for question in asked():
        request = question.request
        images = request.image if isinstance(request.image, list) else [request.image]
        images = images if request.video is None else request.video.frames
        text = request.prompt(PROMPTS)
        answers[text, tuple(np.asarray(one).tobytes() for one in images)] = answer(question)
    return EdgeVLM(engine=FakeEngine.factory(lambda turns: answers[seen(turns[-1])]))


def measured(answer: Callable[[Question], str] = truth) -> Accuracy:
    with engine(answer) as vlm:
        return evaluate(vlm, "fake", iter(asked()), lambda text: None)


def values(result: Accuracy) -> dict[str, float | None]:
    return {name: measure.value for name, measure in result.measures.items()}


def test_the_truth_reaches_everything() -> None:
    result = measured()
    found = values(result)
    assert (found.pop("distance") or 0) < 0.001  # points are thousandths
    assert found == {name: 0.0 if "extra" in name else 1.0 for name in found}
    assert result.passed and result.mistakes == {}


def test_points_beside_their_objects_are_not_found_and_extra() -> None:
    result = measured(lambda question: truth(question, shift=0.06))
    found = values(result)
    assert [found[name] for name in ("points", "points_in_two", "track")] == [0.0, 0.0, 0.0]
    assert [found[name] for name in ("extra_points", "extra_points_in_two")] == [1.0, 1.0]
    assert found["distance"] is None and found["counts"] == 1.0
    assert not result.passed and len(result.mistakes["points"]) == 5
    # At four hundredths a track still follows.
    found = values(measured(lambda question: truth(question, shift=0.04)))
    assert (found["points"], found["track"]) == (0.0, 1.0)


def test_points_in_the_wrong_image_are_not_found() -> None:
    def swapped(question: Question) -> str:
        if question.measure == "points_in_two":
            return coords("points", [2, 1], question.right, 0.0)
        return truth(question)

    found = values(measured(swapped))
    assert (found["points_in_two"], found["extra_points_in_two"], found["points"]) == (0, 1, 1)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Something that nobody asked for.", {"absent", "other", "extra_points"}),
        ("No. Red, green, orange.", {"absent", "other", "extra_points", "yes_no"}),
        ("There are 99.", {"absent", "other", "extra_points"}),
        ('<points coords="1 1 999 999">those</points>', set()),
        ("<points coords=", {"absent", "other", "extra_points"}),
    ],
)
def test_an_answer_that_says_nothing_scores_nothing(answer: str, right: set[str]) -> None:
    found = values(measured(lambda question: answer))
    assert found["points"] == found["caption"] == found["color"] == found["track"] == 0.0
    assert found["counts_5_8"] == found["counts_in_two"] == 0.0
    assert (found["absent"], found["other"]) == ((1, 1) if "absent" in right else (0, 0))
    assert (found["extra_points"] == 0) == ("extra_points" in right)
    assert found["yes_no"] == (0.5 if "yes_no" in right else 0.0)


def test_what_a_model_cannot_do_is_unknown() -> None:
    with engine() as vlm:
        vlm.family = Gemma3()
        result = evaluate(vlm, "gemma", iter(asked()), lambda text: None)
    known = {name for name, value in values(result).items() if value is not None}
    assert known == {"yes_no", "color", "caption"} and result.passed


def test_a_request_that_fails_ends_it() -> None:
    bad = Question("yes_no", Request("gone.png", "Is it?"), "yes")
    with engine() as vlm, pytest.raises(ImageError):
        evaluate(vlm, "fake", iter([bad]), lambda text: None)


def test_questions_follow_from_the_seed() -> None:
    texts = [[(q.text, str(q.right)) for q in questions(SCENES, seed)] for seed in (SEED, SEED, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_each_kind_is_asked_and_yes_is_as_frequent_as_no() -> None:
    kinds = {question.measure for question in asked()}
    derived = {"distance", "extra_points", "extra_points_in_two"}
    assert kinds == {name for name in MEASURES if not name[-1].isdigit()} - derived
    right = [question.right for question in asked() if question.measure == "yes_no"]
    assert right.count("yes") == right.count("no") > 2


def test_what_is_asked_for_lies_where_the_right_answer_says() -> None:
    checked = 0
    for question in asked():
        if question.measure != "points":
            continue
        [(size, centres)], words = question.right, str(question.request.text).split()
        assert words[-1].endswith("s") == (len(centres) > 1)
        for centre in centres if words[0] in COLORS else ():
            x, y = (round(a * b) for a, b in zip(centre, size, strict=True))
            rgb = np.asarray(question.request.image[0])[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
            assert min(np.abs(rgb - typical).max() for typical in COLORS[words[0]]) < 30
            checked += 1
    assert checked


def test_the_command_has_a_column_for_each_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(target: Target, caches: bool) -> EdgeVLM:
        assert caches
        return engine(truth if target.model == "good" else lambda question: "What?")

    monkeypatch.setattr(Target, "open", build)
    monkeypatch.chdir(tmp_path)
    for name in ("good", "bad"):
        Path(name).mkdir()
    path = tmp_path / "a.json"
    arguments = f"accuracy --scenes {SCENES} --seed {SEED} --output {path} --model".split()
    run = CliRunner().invoke(cli.app, [*arguments, "good,bad"], env={"COLUMNS": "160"})
    assert run.exit_code == 0, run.output
    assert "model=good" in run.stdout and "model=bad" in run.stdout
    kept = json.loads(path.read_text())
    assert kept["goals"] == GOALS and [one["passed"] for one in kept["results"]] == [True, False]
    page = path.with_suffix(".md").read_text()
    assert "| objects found | " in page and " | at least 90% | 100.0% | 0.0% |" in page
    strict = [CliRunner().invoke(cli.app, [*arguments, one, "--strict"]) for one in ("good", "bad")]
    assert [one.exit_code for one in strict] == [0, 1]
    assert CliRunner().invoke(cli.app, [*arguments, "a,b", "--dtype", "c,d"]).exit_code == 2
