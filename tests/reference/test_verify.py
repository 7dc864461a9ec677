"""`verify` passes the corrected model and catches vLLM's own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from molmo_edge.errors import ConfigError, ModelError
from molmo_edge.models.hub import DEMO_DIRECTORY
from molmo_edge.models.molmo2.synthetic import write_checkpoint
from molmo_edge.reference.verify import Answer, Family, Report, compare, default_requests, verify

LOGPROBS = [-0.1, -0.2, -0.3]
WANT = Answer([1, 2], [5, 6, 7], LOGPROBS, LOGPROBS)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "family", "names"),
    [
        (None, "molmo", ("small", "text only")),
        (DEMO_DIRECTORY, "molmo2", ("3 images", "video", "two turns")),
    ],
)
def test_the_engine_equals_the_reference_and_stock_vllm_does_not(
    model: Path | None, family: Family, names: tuple[str, ...]
) -> None:
    requests = {name: default_requests(family)[name] for name in names}
    process = {"engine": "process"}
    ours, stock = verify(
        model, family=family, requests=requests, max_tokens=8, stock=True, engine_args=process
    )
    assert ours.ok and not stock.ok
    assert (ours.family, stock.family) == (family, family)
    assert max(case.max_dlogprob or 0.0 for case in ours.cases) <= 1e-4
    assert {"vllm", "torch", "transformers"} <= set(ours.environment)
    verdicts = {case.name: case.ok for case in stock.cases}
    assert not any(verdicts[name] for name in names if name != "text only")


@pytest.mark.parametrize(
    ("change", "exact", "bound", "ok", "first_different"),
    [
        ({}, True, 1e-4, True, None),
        ({"token_ids": [5, 9, 7]}, True, 1e-4, False, 1),
        ({"token_ids": [5, 6], "logprobs": [-0.1, -0.2]}, True, 1e-4, False, 2),
        ({"prompt": [1, 3]}, True, 1e-4, False, None),
        ({"logprobs": [math.nan] * 3}, True, 1e-4, False, None),
        # Otherwise drift is measured on the reference's tokens.
        ({"token_ids": [5, 9, 9], "forced": [-0.1, -0.2, -0.4]}, False, 0.2, True, 1),
        ({"token_ids": [5, 9, 9], "forced": [-0.1, -0.2, -0.4]}, False, 0.05, False, 1),
        ({"forced": [math.nan] * 3}, False, 0.2, False, None),
        ({"forced": [-0.1, math.nan, -0.3]}, False, 0.2, False, None),
    ],
)
def test_an_answer_is_right_when_equal_or_within_the_drift(
    change: dict[str, list[int]], exact: bool, bound: float, ok: bool, first_different: int | None
) -> None:
    case = compare("x", WANT, replace(WANT, **change), exact, bound)
    assert (case.ok, case.first_different) == (ok, first_different)


def test_where_nothing_was_compared_there_is_no_difference() -> None:
    case = compare("x", WANT, replace(WANT, token_ids=[9, 6, 7]), True, 1e-4)
    assert (case.max_dlogprob, case.ok) == (None, False)


def test_a_report_is_right_only_when_every_case_is() -> None:
    good = compare("x", WANT, WANT, True, 1e-4)
    bad = compare("y", WANT, replace(WANT, prompt=[]), True, 1e-4)
    assert Report((good,), {}, "molmo", False, True, 1e-4).ok
    assert not Report((good, bad), {}, "molmo", False, True, 1e-4).ok


def test_a_missing_directory_no_tokens_and_other_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        next(verify(tmp_path))
    with pytest.raises(ConfigError, match="max_tokens"):
        next(verify(max_tokens=0))
    with pytest.raises(ConfigError, match="molmo2: 4b, o-7b"):
        next(verify(family="molmo", layout="4b"))
    with pytest.raises(ConfigError, match="'9b' is not one of any family"):
        next(verify(layout="9b"))
    with pytest.raises(ConfigError, match="family molmo2"):
        next(verify(write_checkpoint(tmp_path), family="molmo"))
