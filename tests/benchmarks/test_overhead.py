"""The comparison with bare vLLM: numbers that can be checked by hand, on the shared harness."""

from __future__ import annotations

from typing import Any

import harness
import overhead
import pytest


def rounds(token_s: dict[str, float]) -> list[dict[str, dict[str, dict[str, Any]]]]:
    """Six rounds whose requests take known times; CPU time is the same as wall time."""
    plan = {"image_first": (0.5, 1), "text_first": (0.01, 1), "text_long": (0.01, 101)}
    one = {
        kind: {
            side: {
                "tokens": tokens,
                "prompt_tokens": 5,
                "text": "x" * tokens,
                "seconds": start + (tokens - 1) * token_s[side],
                "cpu_s": start + (tokens - 1) * token_s[side],
            }
            for side in overhead.SIDES
        }
        for kind, (start, tokens) in plan.items()
    }
    return [one] * 6


EQUAL = {"ours": 0.0100, "bare": 0.0100, "again": 0.0100}


def test_decode_is_what_the_long_answer_takes_beyond_the_short_one() -> None:
    figures = overhead.evaluate([rounds({**EQUAL, "bare": 0.00995})])
    assert figures["decode_tps"]["median"] == pytest.approx(0.995)
    assert figures["ttft_s"]["median"] == pytest.approx(1.0)
    assert figures["cost_us"]["median"] == pytest.approx(50.0)
    assert figures["decode_tps"]["floor"]["median"] == pytest.approx(0.995)
    assert "| CPU µs per token, ours − bare | 50.0" in overhead.markdown(figures)
    assert figures["passed"] and figures["equal_texts"] == 1.0 and figures["equal_prompts"]


@pytest.mark.parametrize("bare", [0.0095, 0.0098])
def test_a_slower_decode_or_a_higher_cost_than_promised_does_not_pass(bare: float) -> None:
    figures = overhead.evaluate([rounds({**EQUAL, "bare": bare})])
    assert not figures["passed"]


def test_one_disturbed_answer_or_pair_moves_no_figure() -> None:
    disturbed = [{kind: dict(sides) for kind, sides in one.items()} for one in rounds(EQUAL)]
    disturbed[2]["text_first"]["bare"] = {**disturbed[2]["text_first"]["bare"], "seconds": 0.31}
    assert overhead.series(disturbed, "bare")["decode_tps"] == pytest.approx([100.0] * 6)
    ratio = harness.paired_ratio([1.0, 1.0, 1.0, 9.0, 1.0], [1.0] * 5)
    assert ratio["median"] == 1.0 and ratio["low"] <= 1.0 <= ratio["high"]
    two = harness.paired_ratio([2.0, 2.0], [1.0, 1.0])
    assert (two["median"], two["low"], harness.interval_text(two)) == (2.0, None, "2.000")
