"""Drift on numbers that can be checked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from molmo_edge.bench import drift
from molmo_edge.bench.cases import Case
from molmo_edge.bench.environment import Target
from molmo_edge.errors import BenchmarkError, ModelError
from molmo_edge.results import Result, Score
from tests.bench.double import DoubleVLM

CASE = Case("dots", "Dots", "Point to the dots.", Image.new("RGB", (200, 100)))
LIKELY = {1: math.log(0.7), 2: math.log(0.2)}


@dataclass
class Scoring(DoubleVLM):
    """Always answers `tokens` with `text`; `shift` moves token 1's log-probability."""

    text: str = '<point x="50.0" y="50.0" alt="dot">dot</point>'
    shift: float = 0.0
    tokens: tuple[int, ...] = (1, 1, 1)

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
            candidates=tuple({token: moved[token] for token in top} for top in candidates),
            prompt_token_ids=(0,),
            greedy_token_ids=tuple(max(moved, key=moved.__getitem__) for _ in answer),
        )


def compared(other: Scoring) -> drift.CaseDrift:
    reference = drift.answer_all(Scoring(), [CASE], max_tokens=3)[0]
    return drift.against(other, *reference, max_tokens=3)


def test_a_shift_of_the_logits_is_measured_token_by_token() -> None:
    shifted = compared(Scoring(shift=-0.5))
    assert (shifted.mean_abs_dlogprob, shifted.max_abs_dlogprob) == pytest.approx((0.5, 0.5))
    assert shifted.equal_greedy == 1.0
    # 0.7 * 0.5 for token 1, nothing for token 2, the rest of 0.1 grows to 0.8 - 0.7/sqrt(e).
    rest = 0.8 - 0.7 * math.exp(-0.5)
    assert shifted.mean_kl == pytest.approx(0.35 + 0.1 * math.log(0.1 / rest))
    assert compared(Scoring(shift=-1.5)).equal_greedy == 0.0


def test_points_are_compared_in_pixels_and_answers_by_their_first_difference() -> None:
    moved = compared(Scoring(text='<point x="53.0" y="54.0" alt="dot">dot</point>', tokens=(1, 2)))
    assert moved.mean_px == pytest.approx(math.hypot(6, 4))
    assert moved.first_divergence == 1
    none = compared(Scoring(text="There are none."))
    assert (none.points_other, none.mean_px) == (0, None)


def test_one_option_varies_and_its_first_value_is_the_reference() -> None:
    given = {"kv_cache_dtype": "auto, fp8", "precision": "bf16"}
    variants = Target.variants(model="m", **given)
    assert list(variants) == ["kv_cache_dtype=auto", "kv_cache_dtype=fp8"]
    options = variants["kv_cache_dtype=fp8"].options
    assert options == {"precision": "bf16", "kv_cache_dtype": "fp8"}
    crops = Target.variants(model="m", max_crops="1,4")
    assert [target.options["max_crops"] for target in crops.values()] == [1, 4]
    models = Target.variants(model="stub,demo")
    assert [target.model for target in models.values()] == ["stub", "demo"]
    assert Target.variants(model="m") == {"m": Target("m")}
    assert list(Target.variants(model=None, config=None)) == ["demo"]
    with pytest.raises(BenchmarkError, match="dtype and precision have several"):
        Target.variants(model="m", dtype="a,b", precision="c,d")
    with pytest.raises(BenchmarkError, match="same value twice"):
        Target.variants(model="demo, demo")
    with pytest.raises(ModelError, match="'nowhere' is not a directory"):
        Target.variants(model="demo,nowhere")
    with pytest.raises(BenchmarkError, match="several values, the reference first"):
        drift.run({"m": Target("m")}, [CASE])


@pytest.mark.parametrize(
    ("shift", "max_kl", "passed"), [(0.0, 0.05, True), (-0.5, 0.05, False), (-0.5, 1.0, True)]
)
def test_the_verdict_follows_the_bounds(
    shift: float, max_kl: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = {"auto": Scoring(), "fp8": Scoring(shift=shift)}
    monkeypatch.setattr(Target, "open", lambda self, _: engines[self.options["kv_cache_dtype"]])
    saved: list[drift.DriftDocument] = []
    variants = Target.variants(model="m", kv_cache_dtype="auto,fp8")
    result = drift.run(variants, [CASE], max_kl=max_kl, save=saved.append)
    assert [one.passed for one in result.drifts] == [passed] and saved == [result]
    text = drift.markdown(result)
    assert "## kv_cache_dtype=fp8" in text and ("passed" if passed else "FAILED") in text
    assert "random weights" in text
