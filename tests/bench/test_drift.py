"""Drift on numbers that can be checked by hand, and the command that judges it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from molmo_edge.bench import __main__ as cli
from molmo_edge.bench import command, drift, drift_run
from molmo_edge.bench.cases import Case
from molmo_edge.bench.command import Target
from molmo_edge.errors import BenchmarkError
from molmo_edge.points import Point
from molmo_edge.results import Result, Score
from tests.bench.double import ENVIRONMENT

CASE = Case("dots", "Dots", "Point to the dots.", Image.new("RGB", (200, 100)))
LIKELY = {1: math.log(0.7), 2: math.log(0.2)}


@dataclass
class Scoring:
    """Always answers tokens 1, 1, 1 with `text`; `shift` moves token 1's log-probability."""

    text: str = '<point x="50.0" y="50.0" alt="dot">dot</point>'
    shift: float = 0.0
    tokens: tuple[int, ...] = (1, 1, 1)
    closed: int = 0

    @property
    def environment(self) -> Mapping[str, Any]:
        return ENVIRONMENT

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed += 1

    def query(self, image: Any, text: str, **options: Any) -> Result:
        top = (LIKELY,) * len(self.tokens)
        return Result(self.text, "stop", self.tokens, (LIKELY[1],) * len(self.tokens), top)

    def score(
        self, image: Any, text: str, answer: Sequence[int], *, candidates: Sequence[Sequence[int]]
    ) -> Score:
        moved = {1: LIKELY[1] + self.shift, 2: LIKELY[2]}
        return Score(
            token_ids=tuple(answer),
            logprobs=tuple(moved[token] for token in answer),
            candidates=tuple({token: moved[token] for token in wanted} for wanted in candidates),
            prompt_token_ids=(0,),
            greedy_token_ids=tuple(max(moved, key=moved.__getitem__) for _ in answer),
        )


def one(other: Scoring) -> drift.CaseDrift:
    known = drift.answers(Scoring(), [CASE], max_tokens=3)
    return drift.against(other, known, max_tokens=3)[0]


def test_the_same_configuration_does_not_drift() -> None:
    found = one(Scoring())
    assert (found.equal_greedy, found.first_divergence) == (1.0, None)
    assert (found.mean_abs_dlogprob, found.max_kl, found.mean_px) == (0.0, 0.0, 0.0)
    assert (found.points_reference, found.points_other) == (1, 1)


def test_a_shift_of_the_logits_is_measured_token_by_token() -> None:
    found = one(Scoring(shift=-0.5))
    assert found.dlogprobs == pytest.approx([-0.5] * 3)
    assert found.equal_greedy == 1.0
    # 0.7 * 0.5 for token 1, nothing for token 2, the rest of 0.1 grows to 0.8 - 0.7/sqrt(e).
    rest = 0.8 - 0.7 * math.exp(-0.5)
    assert found.mean_kl == pytest.approx(0.35 + 0.1 * math.log(0.1 / rest))
    assert one(Scoring(shift=-1.5)).equal_greedy == 0.0


def test_points_are_compared_in_pixels_and_answers_by_their_first_difference() -> None:
    moved = '<point x="53.0" y="54.0" alt="dot">dot</point>'
    found = one(Scoring(text=moved, tokens=(1, 2)))
    assert found.mean_px == pytest.approx(math.hypot(6, 4))
    assert found.first_divergence == 1
    none = one(Scoring(text="There are none."))
    assert (none.points_other, none.mean_px, none.max_px) == (0, None, None)


@pytest.mark.parametrize(
    ("a", "b", "at"),
    [
        ((1, 2), (1, 2), None),
        ((1, 2), (1, 3), 1),
        ((1,), (1, 2), 1),
        ((1, 2), (1,), 1),
        ((), (), None),
    ],
)
def test_an_answer_that_ends_early_differs_where_it_ends(a: Any, b: Any, at: int | None) -> None:
    assert drift.first_difference(a, b) == at


def test_nearest_points_are_paired_first() -> None:
    ours = [Point(0.1, 0.1), Point(0.5, 0.5)]
    theirs = [Point(0.5, 0.51), Point(0.1, 0.1), Point(0.9, 0.9)]
    assert drift.paired_distances(ours, theirs, (100, 100)) == pytest.approx([0.0, 1.0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=20),
    st.lists(st.floats(0.01, 1.0), min_size=20, max_size=20),
    st.floats(0.01, 1.0),
)
def test_divergence_is_never_negative_and_zero_with_itself(
    one: list[float], two: list[float], rest: float
) -> None:
    def normal(values: list[float]) -> dict[int, float]:
        total = sum(values) + rest
        return {i: math.log(value / total) for i, value in enumerate(values)}

    a, b = normal(one), normal(two[: len(one)])
    assert drift.divergence(a, a) == pytest.approx(0.0, abs=1e-9)
    assert drift.divergence(a, b) >= 0.0


def test_divergence_survives_probabilities_that_sum_to_one() -> None:
    whole = {1: math.log(0.5), 2: math.log(0.5)}
    assert drift.divergence(whole, whole) == pytest.approx(0.0, abs=1e-9)
    nearly = {1: math.log(0.5), 2: math.log(0.4)}
    assert math.isfinite(drift.divergence(nearly, whole))


def test_exactly_one_option_varies_and_its_first_value_is_the_reference() -> None:
    found = drift_run.variants(
        Target("m"), {"kv_cache_dtype": "auto, fp8", "precision": "bf16", "dtype": None}
    )
    assert [name for name, _ in found] == ["kv_cache_dtype=auto", "kv_cache_dtype=fp8"]
    assert found[1][1].options == {"precision": "bf16", "kv_cache_dtype": "fp8"}
    for wrong in ({}, {"dtype": "float32"}, {"dtype": "a,b", "precision": "c,d"}):
        with pytest.raises(BenchmarkError, match="exactly one option"):
            drift_run.variants(Target("m"), wrong)


def run_with(monkeypatch: pytest.MonkeyPatch, other: Scoring, *arguments: str) -> Any:
    def build(self: Target, caches: bool) -> Scoring:
        assert caches
        return Scoring() if self.options["kv_cache_dtype"] == "auto" else other

    monkeypatch.setattr(command.Target, "open", build)
    picked = ["drift", "--kv-cache-dtype", "auto,fp8", *arguments]
    return CliRunner().invoke(cli.app, picked, env={"COLUMNS": "180"})


def test_the_exit_status_follows_the_bounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where = ["--output", str(tmp_path / "d.json")]
    good = run_with(monkeypatch, Scoring(), *where)
    assert good.exit_code == 0, good.output
    assert "passed" in good.stdout and "vLLM 0.32.0" in good.stdout
    assert run_with(monkeypatch, Scoring(shift=-1.5), *where).exit_code == 1
    loose = run_with(monkeypatch, Scoring(shift=-0.5), *where, "--max-kl", "1")
    assert loose.exit_code == 0


def test_the_drift_document_fits_its_published_schema(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "d.json"
    run_with(monkeypatch, Scoring(shift=-0.5), "--output", str(path))
    data = resources.files("molmo_edge.bench").joinpath("data", "drift.schema.json").read_text()
    assert json.loads(data) == drift.schema()
    jsonschema.validate(json.loads(path.read_text()), json.loads(data))
    assert "## kv_cache_dtype=fp8" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "wrong", [["--max-tokens", "0"], ["--min-equal", "2"], ["--max-kl", "-1"], ["--dtype", "a,b"]]
)
def test_bad_bounds_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: list[str]
) -> None:
    done = run_with(monkeypatch, Scoring(), "--output", str(tmp_path), *wrong)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
