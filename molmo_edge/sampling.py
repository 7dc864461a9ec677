"""Sampling options of one request, checked before anything reaches the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo_edge.errors import SamplingError

DEFAULT_MAX_TOKENS = 300
MAX_LOGPROBS = 20  # vLLM's own default bound


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Greedy by default: a robot wants the same answer twice.

    Attributes:
        max_tokens: maximum number of tokens to generate, at least 1.
        temperature: 0 is greedy.
        top_p: cumulative probability of the tokens to sample from, 0 < top_p <= 1.
        seed: for repeatable sampling at temperature > 0.
        stop: strings that end the answer and are not part of it.
        logprobs: number of log-probabilities to return per token, 1 to 20, or None.
        json_schema: a JSON Schema that the answer must follow.
        ignore_eos: continue after the end-of-text token; for benchmarks.
        logprob_token_ids: tokens whose log-probabilities to return instead of those of the most
            likely ones; used by `EdgeVLM.score`.

    Raises:
        SamplingError: a value is not a number, out of range, or of the wrong type.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] | str = ()
    logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    ignore_eos: bool = False
    logprob_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise SamplingError("top_p must be above 0; use temperature=0 for greedy decoding.")
        if self.seed is not None:
            check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is True:
            object.__setattr__(self, "logprobs", 1)
        elif self.logprobs is False:
            object.__setattr__(self, "logprobs", None)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, 1, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError("ignore_eos must be True or False.")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
            raise SamplingError("stop must be a string or a list of strings, none of them empty.")
        object.__setattr__(self, "stop", tuple(stop))
        if self.json_schema is not None and not isinstance(self.json_schema, Mapping):
            raise SamplingError("json_schema must be a JSON Schema as a mapping.")


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raise SamplingError unless the value is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        shown = value if isinstance(value, int | float) else type(value).__name__
        raise SamplingError(f"{name} must be an integer from {low} to {high}, not {shown}.")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        shown = value if isinstance(value, int | float) else type(value).__name__
        raise SamplingError(f"{name} must be a number from {low:g} to {high:g}, not {shown}.")


def check_timeout(timeout: float | None) -> float | None:
    """Return the timeout in seconds, or None. Raises SamplingError unless it is positive."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise SamplingError("timeout must be a positive number of seconds, or None.")
    return None if math.isinf(timeout) else float(timeout)
