"""Sampling options of one request, checked before anything reaches the engine."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_LOGPROBS = 20  # vLLM's own default bound


def _stop_strings(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _logprob_count(value: object) -> object:
    if isinstance(value, bool):
        return 1 if value else None
    return value


NonEmpty = Annotated[str, Field(min_length=1)]


class Sampling(BaseModel):
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
            likely ones; used by `EdgeVLM.choose` and `EdgeVLM.score`.
        reuse_prefix: read the KV cache of earlier requests with the same beginning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = 300
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[tuple[NonEmpty, ...], BeforeValidator(_stop_strings)] = ()
    logprobs: Annotated[
        Annotated[int, Field(ge=1, le=MAX_LOGPROBS)] | None, BeforeValidator(_logprob_count)
    ] = None
    json_schema: dict[str, Any] | None = None
    ignore_eos: bool = False
    logprob_token_ids: tuple[int, ...] = ()
    reuse_prefix: bool = False
