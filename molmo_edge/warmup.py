"""Warm up an engine: run every kind of request once, then decode until the speed is steady."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from molmo_edge.errors import ConfigError, PromptTooLongError
from molmo_edge.interface import ModelFamily
from molmo_edge.requests import Request
from molmo_edge.results import Result
from molmo_edge.settings import EdgeSettings

Batch: TypeAlias = Callable[[list[Request]], list[Result]]
"""`EdgeVLM.batch`."""

AGREEMENT = 0.03
"""Decode is steady when two successive speeds differ by at most this fraction."""

_QUESTION = "Describe this."
# Height and width: one tile, and a 4:3 image that fills any grid of crops.
_SMALL, _LARGE = (336, 336), (1152, 1536)
_ALL_CROPS = "all crops"
_CAPTURED = "cudagraph_capture_sizes"


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
        steps: each kind of request, in order.
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
    batch: Batch,
    settings: EdgeSettings,
    family: ModelFamily | None,
    startup_s: Mapping[str, float | None],
    *,
    tokens: int = 32,
    max_rounds: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> WarmupReport:
    """See `EdgeVLM.warmup`.

    Args:
        batch: answers requests by continuous batching.
        family: None for an engine that is not vLLM's.

    Raises:
        ConfigError: `tokens` or `max_rounds` is below 2, which gives no speed or agreement.
        MolmoEdgeError: as `EdgeVLM.query`.
    """
    for name, value in {"tokens": tokens, "max_rounds": max_rounds}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise ConfigError(f"warmup: {name} must be an integer of at least 2.")
    began = clock()
    steps = []
    probe: _Kind | None = None
    for kind in _kinds(settings, family):
        requests = [kind.request(seed, tokens) for seed in range(kind.count)]
        steps.append(_run(batch, kind.name, requests, clock))
        # All crops would only add prefill to each round, which on a CPU is seconds.
        if kind.count == 1 and kind.name != _ALL_CROPS and steps[-1].skipped is None:
            probe = kind
    speeds: list[float] = []
    while probe is not None and len(speeds) < max_rounds and not _agree(speeds):
        speed = batch([probe.request(1000 + len(speeds), tokens)])[0].metrics.output_tps
        if speed is None:  # the answer had no room for a second token
            break
        speeds.append(speed)
    return WarmupReport(
        steps=tuple(steps),
        decode_tps=tuple(speeds),
        steady=_agree(speeds),
        seconds=clock() - began,
        startup_s=startup_s,
    )


def batch_sizes(settings: EdgeSettings) -> tuple[int, ...]:
    """Batch sizes to run: those that graphs are captured for, else 1, 2, 4 …

    None is above `max_num_seqs`, which is always the last.
    """
    largest = settings.max_num_seqs
    compilation = settings.engine_args.get("compilation_config")
    captured = compilation.get(_CAPTURED) if isinstance(compilation, Mapping) else None
    sizes = captured or [2**power for power in range(largest.bit_length())]
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
        return Request(
            image,
            f"{_QUESTION} {seed}",
            max_tokens=tokens,
            ignore_eos=True,
            max_crops=self.max_crops,
        )


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


def _run(
    batch: Batch, name: str, requests: list[Request], clock: Callable[[], float]
) -> WarmupStep:
    began = clock()
    try:
        metrics = [result.metrics for result in batch(requests)]
    except PromptTooLongError:
        return WarmupStep(name, len(requests), skipped="longer than max_model_len")
    return WarmupStep(
        name,
        len(requests),
        seconds=clock() - began,
        ttft_s=max((one.ttft_s for one in metrics if one.ttft_s is not None), default=None),
        prompt_tokens=max(
            (one.prompt_tokens for one in metrics if one.prompt_tokens is not None), default=None
        ),
        output_tokens=sum(one.output_tokens for one in metrics),
    )


def _agree(speeds: list[float]) -> bool:
    if len(speeds) < 2:
        return False
    last, before = speeds[-1], speeds[-2]
    return abs(last - before) <= AGREEMENT * max(last, before)
