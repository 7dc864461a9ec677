"""Conversations, user text and options are refused before they reach the engine."""

from __future__ import annotations

import math
from typing import Any

import pytest

from molmo_edge.errors import PromptError, SamplingError
from molmo_edge.interface import Turn
from molmo_edge.requests import (
    Options,
    Request,
    check_options,
    check_turns,
    read_messages,
    refuse_special,
)
from molmo_edge.sampling import Sampling, check_timeout


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [("assistant", "x")],
        [("user", "x"), ("user", "x")],
        [("user", "x"), ("assistant", "x")],
        [("system", "x"), ("user", "x")],
        *([("user", text)] for text in ("", "  \n", None, 5, b"x", "\ud800")),
        [("user", "x"), ("assistant", ""), ("user", "x")],
    ],
)
def test_turns_out_of_order_or_without_text_are_refused(turns: list[Any]) -> None:
    with pytest.raises(PromptError):
        check_turns([Turn(*turn) for turn in turns])
    check_turns([Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")])


def test_special_tokens_are_refused_by_name() -> None:
    refuse_special([1, 2, 3], {7: "<im_patch>"})
    with pytest.raises(PromptError, match=r"<a>, <im_patch>: special tokens"):
        refuse_special([1, 7, 8, 7], {7: "<im_patch>", 8: "<a>"})


@pytest.mark.parametrize(
    "message",
    [
        "text",
        {"role": "user"},
        {"role": "system", "content": "x"},
        {"role": "user", "content": b"x"},
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "user", "content": [{"type": "image", "image": None}]},
    ],
)
def test_messages_of_another_structure_are_refused_by_number(message: Any) -> None:
    with pytest.raises(PromptError, match="Message 2"):
        read_messages([{"role": "user", "content": "x"}, message])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, True, "0"]),
        ("top_p", [0, 1.5, math.nan]),
        ("max_tokens", [0, -3, 2.0, True]),
        ("seed", [1.5, 2**70]),
        ("logprobs", [0, 21, 1.0]),
        ("stop", [[""], [1], 5]),
        ("json_schema", ["{}"]),
        ("ignore_eos", [1]),
    ],
)
def test_wrong_sampling_values_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(SamplingError, match=name):
            Sampling(**{name: value})


def test_greedy_is_the_default_and_logprobs_may_be_true() -> None:
    assert Sampling().temperature == 0
    assert Sampling(logprobs=True).logprobs == 1  # type: ignore[arg-type]
    assert Sampling(stop="x").stop == ("x",)
    assert set(Request(None, "x").options()) == set(Options.__annotations__)


def test_wrong_options_are_refused() -> None:
    for timeout in (0, -1, math.nan, True, "1"):
        with pytest.raises(SamplingError, match="timeout"):
            check_timeout(timeout)  # type: ignore[arg-type]
    for max_crops in (0, 13, True, 2.0):
        with pytest.raises(SamplingError, match="max_crops"):
            check_options({"max_crops": max_crops}, 12)
    with pytest.raises(SamplingError, match="Did you mean max_tokens"):
        check_options({"max_token": 3}, 12)
