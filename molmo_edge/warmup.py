"""Warm up an engine: run every kind of request once, then decode until the speed is steady."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from molmo_edge.errors import ConfigError, PromptTooLongError
from molmo_edge.interface import ModelFamily
from molmo_edge.requests import Request
from molmo_edge.results import Result
from molmo_edge.settings import EdgeSettings

AGREEMENT = 0.03
"""Decode is steady when two successive speeds differ by at most this fraction."""

# Height and width: one tile, and a 4:3 image that fills any grid of crops.
_SMALL, _LARGE = (336, 336), (1152, 1536)
_ALL_CROPS = "all crops"


@dataclass(frozen=True)
class WarmupStep:
    """One kind of request, run for the first time.

    Attributes:
        name: the kind.
        requests: number of requests decoded together.
        seconds: until the last of them was answered.
        ttft_s: the longest time to first token among them; None if unknown.
        prompt_tokens: of the longest prompt; None if unknown.
        output_tokens: of all requests.
        skipped: why it did not run; None when it ran.
    """

    name: str
    requests: int
    seconds: float | None = None
    ttft_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    skipped: str | None = None


@dataclass(frozen=True)
class WarmupReport:
    """Result of a warm-up.

    Attributes:
        steps: one for each kind of request, in order.
        decode_tps: successive decode speeds of one request, tokens per second.
        steady: whether the last two of them agree within `AGREEMENT`.
        seconds: duration of the warm-up.
        startup_s: seconds of each part of the engine's start before it, as `EdgeVLM.startup`.
    """

    steps: tuple[WarmupStep, ...]
    decode_tps: tuple[float, ...]
    steady: bool
    seconds: float
    startup_s: Mapping[str, float | None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "startup_s": dict(self.startup_s), "agreement": AGREEMENT}


def warm(
    batch: Callable[[list[Request]], list[Result]],
    settings: EdgeSettings,
    family: ModelFamily | None,
    startup_s: Mapping[str, float | None],
    tokens: int,
    max_rounds: int,
) -> WarmupReport:
    """See `EdgeVLM.warmup`; `family` is None for an engine that is not vLLM's."""
    if tokens < 2 or max_rounds < 2:
        raise ConfigError("warmup: tokens and max_rounds must be at least 2.")
    began = time.perf_counter()
    steps = []
    probe: _Kind | None = None
    for kind in _kinds(settings, family):
        steps.append(_run(batch, kind, tokens))
        # All crops would only add prefill to each round, which on a CPU is seconds.
        if kind.count == 1 and kind.name != _ALL_CROPS and steps[-1].skipped is None:
            probe = kind
    speeds: list[float] = []
    while probe is not None and len(speeds) < max_rounds and not _agree(speeds):
        speed = batch([probe.request(1000 + len(speeds), tokens)])[0].metrics.output_tps
        if speed is None:  # the answer had no room for a second token
            break
        speeds.append(speed)
    seconds = time.perf_counter() - began
    return WarmupReport(tuple(steps), tuple(speeds), _agree(speeds), seconds, startup_s)


def batch_sizes(settings: EdgeSettings) -> tuple[int, ...]:
    """Sizes up to `max_num_seqs`: those that graphs are captured for, else 2, 4, 8 …"""
    largest = settings.max_num_seqs
    compilation = settings.engine_args.get("compilation_config", {})
    sizes = compilation.get("cudagraph_capture_sizes", [2**n for n in range(largest.bit_length())])
    return tuple(sorted({size for size in sizes if 1 < size < largest} | {largest}))


@dataclass(frozen=True)
class _Kind:
    """Requests of one shape, `count` of them together."""

    name: str
    count: int = 1
    size: tuple[int, int] | None = None  # height and width of the image
    max_crops: int | None = None

    def request(self, seed: int, tokens: int) -> Request:
        # Another image and text each time: a cache would hide the cost of the first.
        image = None
        if self.size is not None:
            shape = (*self.size, 3)
            image = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        text = f"Describe this. {seed}"
        return Request(image, text, tokens, ignore_eos=True, max_crops=self.max_crops)


def _kinds(settings: EdgeSettings, family: ModelFamily | None) -> Iterator[_Kind]:
    """Single requests first, from small to large, then batches."""
    crops = family is None or family.crops
    images = family is None or family.max_images > 0
    text = _Kind("text")
    small = _Kind("global view" if crops else "image", 1, _SMALL, 1 if crops else None)
    yield text
    if images:
        yield small
    if images and crops:
        yield _Kind(_ALL_CROPS, 1, _LARGE)
    for size in batch_sizes(settings):
        if size > 1:
            yield replace(small if images else text, name=f"batch of {size}", count=size)


def _run(batch: Callable[[list[Request]], list[Result]], kind: _Kind, tokens: int) -> WarmupStep:
    requests = [kind.request(seed, tokens) for seed in range(kind.count)]
    began = time.perf_counter()
    try:
        metrics = [result.metrics for result in batch(requests)]
    except PromptTooLongError:
        return WarmupStep(kind.name, kind.count, skipped="longer than max_model_len")
    return WarmupStep(
        kind.name,
        kind.count,
        seconds=time.perf_counter() - began,
        ttft_s=max((one.ttft_s for one in metrics if one.ttft_s is not None), default=None),
        prompt_tokens=max(one.prompt_tokens or 0 for one in metrics) or None,
        output_tokens=sum(one.output_tokens for one in metrics),
    )


def _agree(speeds: list[float]) -> bool:
    return len(speeds) > 1 and math.isclose(speeds[-1], speeds[-2], rel_tol=AGREEMENT)
