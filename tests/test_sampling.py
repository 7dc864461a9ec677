"""Sampling options are refused before they reach the engine."""

from __future__ import annotations

import math
from typing import Any

import pytest

from molmo_edge.errors import SamplingError
from molmo_edge.requests import Options, Request, check_options
from molmo_edge.sampling import Sampling, check_timeout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("temperature", "0"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("max_tokens", 2.0),
        ("max_tokens", True),
        ("seed", 1.5),
        ("seed", 2**70),
        ("logprobs", 0),
        ("logprobs", 21),
        ("logprobs", 1.0),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", 5),
        ("json_schema", "{}"),
        ("ignore_eos", 1),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=name):
        Sampling(**{name: value})


def test_greedy_is_the_default_and_logprobs_may_be_true() -> None:
    assert Sampling().temperature == 0
    assert Sampling(logprobs=True).logprobs == 1  # type: ignore[arg-type]
    assert Sampling(stop="x").stop == ("x",)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, True, "1"])
def test_wrong_timeouts_are_refused(timeout: Any) -> None:
    with pytest.raises(SamplingError, match="timeout"):
        check_timeout(timeout)


def test_misspelt_options_get_the_nearest_name() -> None:
    with pytest.raises(SamplingError, match="max_tokens"):
        check_options({"max_token": 3}, 12)


@pytest.mark.parametrize("max_crops", [0, 13, True, 2.0])
def test_max_crops_stay_within_the_engines(max_crops: Any) -> None:
    with pytest.raises(SamplingError, match="max_crops"):
        check_options({"max_crops": max_crops}, 12)


def test_a_request_holds_every_option() -> None:
    assert set(Request(None, "x").options()) == set(Options.__annotations__)
