"""Warm up an engine: run every kind of request once, then decode until the speed is steady."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from molmo_edge.errors import ConfigError, PromptTooLongError
from molmo_edge.interface import ModelFamily
from molmo_edge.requests import Request
from molmo_edge.results import Result
from molmo_edge.settings import EdgeSettings, plain
from molmo_edge.video import Video

AGREEMENT = 0.03
"""Decode is steady when two successive speeds differ by at most this fraction."""

# Height and width: one tile, and a 4:3 image that fills any grid of crops.
_SMALL, _LARGE = (336, 336), (1152, 1536)
_FRAMES = 8


@dataclass(frozen=True)
class WarmupStep:
    """One kind of request, run for the first time.

    Attributes:
        name: the kind.
        requests: number of requests decoded together.
        seconds: until the last of them was answered; None when they are longer than the context.
        ttft_s: the longest time to first token among them; None if unknown.
    """

    name: str
    requests: int
    seconds: float | None = None
    ttft_s: float | None = None


@dataclass(frozen=True)
class WarmupReport:
    """Result of a warm-up.

    Attributes:
        steps: one for each kind of request, in order.
        decode_tps: successive decode speeds of one text request, tokens per second.
        steady: whether the last two of them agree within `AGREEMENT`.
        seconds: duration of the warm-up.
    """

    steps: tuple[WarmupStep, ...]
    decode_tps: tuple[float, ...]
    steady: bool
    seconds: float


def warm(
    batch: Callable[[list[Request]], list[Result]],
    settings: EdgeSettings,
    family: ModelFamily | None,
    tokens: int,
    max_rounds: int,
) -> WarmupReport:
    """See `EdgeVLM.warmup`; `family` is None for an engine that is not vLLM's."""
    tokens, max_rounds = plain(tokens), plain(max_rounds)
    if any(type(count) is not int or count < 2 for count in (tokens, max_rounds)):
        raise ConfigError("warmup: tokens and max_rounds must be integers of at least 2.")
    began = time.perf_counter()
    steps = tuple(
        _run(batch, name, requests) for name, requests in _kinds(settings, family, tokens)
    )
    speeds: list[float] = []
    while len(speeds) < max_rounds and not _agree(speeds):
        speed = batch([_request(1000 + len(speeds), tokens)])[0].metrics.output_tps
        if speed is None:  # the answer had no room for a second token
            break
        speeds.append(speed)
    return WarmupReport(steps, tuple(speeds), _agree(speeds), time.perf_counter() - began)


def _kinds(
    settings: EdgeSettings, family: ModelFamily | None, tokens: int
) -> Iterator[tuple[str, list[Request]]]:
    """Single requests first, from small to large, then batches of powers of two."""
    crops = family is None or family.crops
    size = _SMALL if family is None or family.max_images > 0 else None
    max_crops = 1 if crops else None
    # Once with log-probabilities, whose kernel vLLM compiles when they are first requested.
    yield "text", [_request(0, tokens, logprobs=1)]
    if size is not None:
        yield "global view" if crops else "image", [_request(0, tokens, size, max_crops)]
        if crops:
            yield "all crops", [_request(0, tokens, _LARGE)]
    if family is not None and "video" in family.verbs:
        frames = np.random.default_rng(0).integers(0, 256, (_FRAMES, *_SMALL, 3), dtype=np.uint8)
        video = Video(frames, fps=2.0)
        yield "video", [Request(None, "Track it.", video=video, max_tokens=tokens, ignore_eos=True)]
    counts = {2**n for n in range(1, settings.max_num_seqs.bit_length())} | {settings.max_num_seqs}
    for count in sorted(counts - {1}):
        yield f"batch of {count}", [_request(i, tokens, size, max_crops) for i in range(count)]


def _request(
    seed: int,
    tokens: int,
    size: tuple[int, int] | None = None,
    max_crops: int | None = None,
    logprobs: int | None = None,
) -> Request:
    """Another image and text for each seed: a cache would hide the cost of the first."""
    image = None
    if size is not None:
        image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    text = f"Describe this. {seed}"
    return Request(
        image, text, max_tokens=tokens, ignore_eos=True, max_crops=max_crops, logprobs=logprobs
    )


def _run(
    batch: Callable[[list[Request]], list[Result]], name: str, requests: list[Request]
) -> WarmupStep:
    began = time.perf_counter()
    try:
        results = batch(requests)
    except PromptTooLongError:
        return WarmupStep(name, len(requests))
    seconds = time.perf_counter() - began
    ttfts = [one.metrics.ttft_s for one in results if one.metrics.ttft_s is not None]
    return WarmupStep(name, len(requests), seconds, max(ttfts, default=None))


def _agree(speeds: list[float]) -> bool:
    return len(speeds) > 1 and math.isclose(speeds[-1], speeds[-2], rel_tol=AGREEMENT)
