"""The promise of `verify`: tokens and log-probabilities of AllenAI's reference, in float32."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from molmo_edge.errors import ConfigError, ModelError
from molmo_edge.reference import verify
from molmo_edge.reference.verify import Report, _Answer, _case, _Expected, picture

PICTURES = {"small": picture(90, 120, 0), "wide": picture(224, 460, 1), "text only": None}
WANT = _Expected(prompt=[1, 2], token_ids=[5, 6, 7], logprobs=[-0.1, -0.2, -0.3])


def got(**changes: object) -> _Answer:
    same = {"prompt": [1, 2], "token_ids": [5, 6, 7], "logprobs": [-0.1, -0.2, -0.3]}
    return _Answer(**{**same, "forced": [-0.1, -0.2, -0.3], **changes})  # type: ignore[arg-type]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["7b-d", "7b-o"])
def test_the_engine_equals_the_yardstick_and_stock_vllm_does_not(layout: str) -> None:
    stock = layout == "7b-d"
    reports = list(
        verify.verify(layout=layout, pictures=PICTURES, max_tokens=8, stock=stock)  # type: ignore[arg-type]
    )
    for case in reports[0].cases:
        assert case.ok, case
        assert case.max_dlogprob <= 1e-4
    assert {"vllm", "torch", "transformers"} <= set(reports[0].environment)
    if stock:
        off = {case.name: case.ok for case in reports[1].cases}
        assert off["small"] is False
        assert off["wide"] is False


def test_equal_answers_pass() -> None:
    case = _case("x", WANT, got(), exact=True, bound=1e-4)
    assert case.ok
    assert case.first_different is None


def test_one_other_token_fails_and_is_located() -> None:
    case = _case("x", WANT, got(token_ids=[5, 9, 7]), exact=True, bound=1e-4)
    assert not case.ok
    assert case.first_different == 1


def test_a_shorter_answer_fails() -> None:
    case = _case("x", WANT, got(token_ids=[5, 6], logprobs=[-0.1, -0.2]), True, 1e-4)
    assert not case.ok
    assert case.first_different == 2


def test_another_prompt_fails() -> None:
    assert not _case("x", WANT, got(prompt=[1, 3]), exact=True, bound=1e-4).ok


def test_drift_is_measured_on_forced_tokens() -> None:
    answer = got(token_ids=[5, 9, 9], forced=[-0.1, -0.2, -0.4])
    assert _case("x", WANT, answer, exact=False, bound=0.2).ok
    assert not _case("x", WANT, answer, exact=False, bound=0.05).ok


def test_nan_is_never_right() -> None:
    assert not _case("x", WANT, got(logprobs=[math.nan] * 3), exact=True, bound=1e-4).ok


def test_a_report_is_right_only_when_every_case_is() -> None:
    good = _case("x", WANT, got(), True, 1e-4)
    bad = _case("y", WANT, got(prompt=[]), True, 1e-4)
    assert Report((good,), {}, False, True, 1e-4).ok
    assert not Report((good, bad), {}, False, True, 1e-4).ok


def test_a_missing_folder_and_no_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        next(verify.verify(tmp_path, pictures={"text only": None}))
    with pytest.raises(ConfigError, match="max_tokens"):
        next(verify.verify(max_tokens=0))
