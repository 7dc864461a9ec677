"""What is computed from the counts of each side."""

from __future__ import annotations

from typing import Any

import pytest
import speculation


def side(accepted: int, seconds: float, text: str = "a") -> dict[str, Any]:
    one = {
        "answers": 2, "tokens": 30, "steps": 30 - accepted, "drafted": 2 * accepted,
        "accepted": accepted, "seconds": seconds, "texts": [text],
    }  # fmt: skip
    return dict.fromkeys(speculation.TITLES, one)


def test_a_step_yields_its_token_and_the_accepted_drafts() -> None:
    start = {"off": side(0, 3.0), "again": side(0, 3.0), "ngram": side(0, 3.0)}
    figures = speculation.evaluate([{**start, "format": side(20, 1.5)}])["points"]
    assert figures["equal_answers"]
    assert figures["off"]["acceptance"] is None and figures["off"]["steps_per_answer"] == 15
    drafted = figures["format"]
    assert (drafted["tokens_per_step"], drafted["acceptance"]) == (3.0, 0.5)
    assert drafted["decode_tps"]["median"] == pytest.approx(2.0)
    assert not speculation.evaluate([{**start, "format": side(20, 1.5, "b")}])["points"][
        "equal_answers"
    ]
