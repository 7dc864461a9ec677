"""Results of requests: `Result`, `Choice`, `Score` and `Metrics`, frozen values.

Times are seconds on the monotonic clock, counts are tokens; unknown is None, never 0.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any


@dataclass(frozen=True)
class Metrics:
    """Timings and counts of one request.

    Attributes:
        queue_s: from the end of preprocessing until the engine took the request; waiting for a free
            sequence inside vLLM's scheduler counts as time to first token.
        preprocess_s: tokenising, decoding and cropping, in the caller's thread.
        ttft_s: time to first token, from the call on, preprocessing and queue included.
        itl_s: inter-token latencies, one for each token after the first; tokens that arrive
            together (speculation) share one gap: the first of them has it, the others 0.
        tpot_s: mean time per output token after the first.
        e2e_s: the whole request, from the call to its last token.
        prompt_tokens: prompt length, image tokens included.
        image_tokens: tokens of the prompt that belong to images or video.
        output_tokens: generated tokens, the end-of-text token included.
        cached_tokens: prompt tokens found in the prefix cache.
        output_tps: decode speed: tokens after the first ÷ their time.
        request_tps: output tokens ÷ e2e_s, the "tok/s" of HTTP-style reports.
    """

    queue_s: float | None = None
    preprocess_s: float | None = None
    ttft_s: float | None = None
    itl_s: tuple[float, ...] = ()
    tpot_s: float | None = None
    e2e_s: float | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    output_tokens: int = 0
    cached_tokens: int | None = None
    output_tps: float | None = None
    request_tps: float | None = None


@dataclass(frozen=True)
class Result:
    """A finished answer.

    Attributes:
        text: the answer, without the leading space that Molmo starts with.
        finish_reason: ``"stop"`` (end of text or a stop string) or ``"length"`` (`max_tokens` or
            the context is used up).
        token_ids: generated tokens, the end-of-text token included when it was generated.
        logprobs: natural-log probability of each generated token under the model's raw
            distribution, aligned with `token_ids`; None unless requested.
        top_logprobs: for each generated token, token id → log-probability of the most likely ones;
            None unless more than one was requested.
        parsed: value of the text when `json_schema` was given: JSON's own types, or an instance of
            the pydantic model; None otherwise.
        metrics: timings and counts.
        environment: versions and settings that produced it (vLLM, torch, transformers, model, …).
    """

    text: str
    finish_reason: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[Mapping[int, float], ...] | None = None
    parsed: Any = None
    metrics: Metrics = Metrics()
    environment: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """For notebooks."""
        return paragraph(self.text)


def paragraph(text: str) -> str:
    """Text as HTML that keeps its lines."""
    return f'<p style="white-space: pre-wrap">{html.escape(text)}</p>'


@dataclass(frozen=True)
class Choice:
    """The most likely of several given answers.

    Attributes:
        choice: the most likely one; of equally likely ones the first.
        probabilities: choice → probability, in the order given; they add up to 1.
        outside: probability, before that normalisation, of answers that begin with none of them.
        metrics: of the first request, with `e2e_s` of the whole; `output_tokens` is the number of
            requests.
        environment: versions and settings that produced it.
    """

    choice: str
    probabilities: Mapping[str, float]
    outside: float
    metrics: Metrics = Metrics()
    environment: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def _repr_html_(self) -> str:
        """For notebooks."""
        ranked = sorted(self.probabilities.items(), key=lambda item: -item[1])
        return paragraph("\n".join(f"{probability:.3f} {one}" for one, probability in ranked))

    def __str__(self) -> str:
        return self.choice

    @classmethod
    def of(
        cls,
        answers: Mapping[str, Sequence[int]],
        scores: Mapping[tuple[int, ...], Mapping[int, float]],
        results: Sequence[Result],
    ) -> Choice:
        """Read a choice out of scored tokens.

        Args:
            answers: choice → its tokens.
            scores: beginning of an answer → log-probabilities of the tokens that follow it.
            results: those of the requests that scored them.
        """
        logprobs = {
            choice: sum(scores[tuple(ids[:i])][token] for i, token in enumerate(ids))
            for choice, ids in answers.items()
        }
        highest = max(logprobs.values())
        # Relative to the highest, as long answers have probabilities below the smallest float.
        weights = {choice: math.exp(one - highest) for choice, one in logprobs.items()}
        total = sum(weights.values())
        # One that continues another is part of it.
        starts = {tuple(ids) for ids in answers.values()}
        inside = sum(
            math.exp(logprobs[choice])
            for choice, ids in answers.items()
            if not any(tuple(ids[:i]) in starts for i in range(1, len(ids)))
        )
        return cls(
            choice=max(weights, key=weights.__getitem__),
            probabilities={choice: one / total for choice, one in weights.items()},
            outside=max(0.0, 1 - inside),
            metrics=replace(
                results[0].metrics,
                e2e_s=max(one.metrics.e2e_s or 0.0 for one in results),
                output_tokens=len(results),
                request_tps=None,
            ),
            environment=results[0].environment,
        )


@dataclass(frozen=True)
class Score:
    """Teacher-forced log-probabilities of a given answer.

    Attributes:
        token_ids: the answer.
        logprobs: natural-log probability of each of its tokens.
        candidates: for each, token id → log-probability of the candidates that were requested.
        prompt_token_ids: the prompt before the answer, image tokens included.
        greedy_token_ids: for each, the model's most likely token at that position, over the whole
            vocabulary.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    candidates: tuple[Mapping[int, float], ...]
    prompt_token_ids: tuple[int, ...]
    greedy_token_ids: tuple[int, ...]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, also where one answer ends first; None if equal."""
    pairs = enumerate(zip_longest(one, other))
    return next((i for i, (a, b) in pairs if a != b), None)
