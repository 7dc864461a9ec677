"""Messages and options that are wrong are refused by number and by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from molmo_edge.errors import PromptError, SamplingError
from molmo_edge.images import DEFAULT_LIMITS
from molmo_edge.requests import check_options, check_turns, read_turns


def refuse(video: object) -> Any:
    raise AssertionError("no video is loaded")


@pytest.mark.parametrize(
    "message",
    [
        "text",
        {"role": "user"},
        {"role": "system", "content": "x"},
        {"role": np.array(["user", "user"]), "content": "x"},
        *(
            {"role": "user", "content": content}
            for content in (
                None,
                b"x",
                [{"type": "text", "text": 5}],
                [{"type": "video"}],
                [{"type": np.array(["text", "text"]), "text": "x"}],
                [{"type": "image", "image": None}],
                [{"type": "image_url"}],
                [{"type": "image_url", "image_url": {"url": "https://host/a.png"}}],
                [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}],
                [{"type": "video_url", "video_url": "file:///etc/passwd"}],
            )
        ),
    ],
)
def test_messages_of_another_structure_are_refused_by_number(message: Any) -> None:
    with pytest.raises(PromptError, match="Message 2"):
        read_turns([{"role": "user", "content": "x"}, message], DEFAULT_LIMITS, refuse)


def test_a_past_answer_may_be_empty() -> None:
    roles = ("user", "assistant", "user")
    texts = ("x", "", "y")
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    check_turns(read_turns(messages, DEFAULT_LIMITS, refuse))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, True, "0", 1e300, 10**400, 10**5000]),
        ("top_p", [0, 1.5, math.nan, 10**5000]),
        ("max_tokens", [0, -3, 2.0, True, None, 10**5000]),
        ("seed", [1.5, 2**70]),
        ("logprobs", [0, 21, 1.0]),
        ("stop", [[""], [1], 5, None, [None], ["\ud800"], 10**5000]),
        ("json_schema", ["{}"]),
        ("ignore_eos", [1, np.ones(2)]),
        ("timeout", [0, -1, math.nan, True, "1", 10**400]),
        ("max_crops", [0, 13, True, 2.0]),
    ],
)
def test_wrong_options_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(SamplingError, match=name):
            check_options({"json_schema": {"type": "object"}, name: value}, 12)


def test_options_have_defaults_and_short_forms_and_no_others() -> None:
    assert check_options({}, 12).temperature == 0
    assert check_options({"logprobs": True}, 12).logprobs == 1
    assert check_options({"logprobs": False}, 12).logprobs is None
    assert check_options({"stop": "x"}, 12).stop == ("x",)
    assert check_options({"stop": ["x", "y"]}, 12).stop == ("x", "y")
    for name in ("max_token", "answer_model", "logprob_token_ids"):
        with pytest.raises(SamplingError, match=f"Unknown option {name}"):
            check_options({name: None}, 12)
    with pytest.raises(SamplingError, match="Did you mean max_tokens"):
        check_options({"max_token": 3}, 12)
