"""Warming an engine up: every kind of request once, then decoding until its speed is steady.

Uses only what a user could: requests go through `EdgeVLM.batch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_edge.errors import ConfigError, PromptTooLongError
from molmo_edge.requests import Request

if TYPE_CHECKING:
    from molmo_edge.vlm import EdgeVLM

AGREEMENT = 0.03
"""Decode is steady when two successive speeds differ by no more than this share."""

_QUESTION = "Describe this."
# Height and width: one tile, and a 4:3 picture that fills any grid of crops.
_SMALL, _LARGE = (336, 336), (1152, 1536)
_ALL_CROPS = "all crops"
_CAPTURED = "cudagraph_capture_sizes"


@dataclass(frozen=True)
class WarmupStep:
    """One kind of request, run for the first time.

    Attributes:
        name: what it was.
        requests: how many together.
        seconds: until the last of them was answered.
        ttft_s: the longest time to first token among them; None if none is known.
        prompt_tokens: of the longest prompt; None if not known.
        output_tokens: of all together.
        skipped: why it was left out; None when it ran.
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
    """What a warm-up measured.

    Attributes:
        steps: each kind of request, in order.
        decode_tps: successive decode speeds of one request, tokens per second.
        steady: whether the last two of them agree within `AGREEMENT`.
        seconds: the whole warm-up.
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
    vlm: EdgeVLM,
    *,
    tokens: int = 32,
    max_rounds: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> WarmupReport:
    """See `EdgeVLM.warmup`.

    Raises:
        ConfigError: `tokens` or `max_rounds` is below 2, from which no speed or agreement comes.
        MolmoEdgeError: as `EdgeVLM.query`.
    """
    for name, value in {"tokens": tokens, "max_rounds": max_rounds}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise ConfigError(f"warmup: {name} must be a whole number, 2 or more.")
    began = clock()
    steps = []
    probe: Callable[[int], Request] | None = None
    for name, request, many in _kinds(vlm, tokens):
        steps.append(_run(vlm, name, [request(seed) for seed in range(many)], clock))
        # All crops would only add prefill to each round, which on a CPU is seconds.
        if many == 1 and name != _ALL_CROPS and steps[-1].skipped is None:
            probe = request
    speeds: list[float] = []
    while probe is not None and len(speeds) < max_rounds and not _agree(speeds):
        speed = vlm.batch([probe(1000 + len(speeds))])[0].metrics.output_tps
        if speed is None:  # the answer had no room for a second token
            break
        speeds.append(speed)
    return WarmupReport(
        steps=tuple(steps),
        decode_tps=tuple(speeds),
        steady=_agree(speeds),
        seconds=clock() - began,
        startup_s=dict(vlm.startup),
    )


def batch_sizes(settings: Any) -> tuple[int, ...]:
    """Requests together that are worth a run: the sizes graphs are captured for, else 1, 2, 4 …

    None is above `max_num_seqs`, which is always the last.
    """
    most = settings.max_num_seqs
    compilation = settings.engine_args.get("compilation_config")
    sizes = compilation.get(_CAPTURED) if isinstance(compilation, Mapping) else None
    chosen = sizes or [2**power for power in range(most.bit_length())]
    return tuple(sorted({size for size in chosen if 1 < size < most} | {most}))


def _kinds(vlm: EdgeVLM, tokens: int) -> Iterator[tuple[str, Callable[[int], Request], int]]:
    """Name, maker and number of requests; single ones first, from small to large."""
    family = vlm.family
    crops = family is None or family.crops
    pictures = family is None or family.max_images > 0

    def asked(seed: int, size: tuple[int, int] | None, max_crops: int | None = None) -> Request:
        # Another picture and text each time: a cache would hide what the first one costs.
        image = None if size is None else _picture(seed, size)
        text = f"{_QUESTION} {seed}"
        return Request(image, text, max_tokens=tokens, ignore_eos=True, max_crops=max_crops)

    def text(seed: int) -> Request:
        return asked(seed, None)

    def small(seed: int) -> Request:
        return asked(seed, _SMALL, max_crops=1 if crops else None)

    def large(seed: int) -> Request:
        return asked(seed, _LARGE)

    yield "text", text, 1
    if pictures:
        yield ("global view" if crops else "picture"), small, 1
    if pictures and crops:
        yield _ALL_CROPS, large, 1
    for size in batch_sizes(vlm.settings):
        if size > 1:
            yield f"batch of {size}", small if pictures else text, size


def _run(
    vlm: EdgeVLM, name: str, requests: list[Request], clock: Callable[[], float]
) -> WarmupStep:
    began = clock()
    try:
        found = [result.metrics for result in vlm.batch(requests)]
    except PromptTooLongError:
        return WarmupStep(name, len(requests), skipped="longer than max_model_len")
    return WarmupStep(
        name,
        len(requests),
        seconds=clock() - began,
        ttft_s=max((one.ttft_s for one in found if one.ttft_s is not None), default=None),
        prompt_tokens=max(
            (one.prompt_tokens for one in found if one.prompt_tokens is not None), default=None
        ),
        output_tokens=sum(one.output_tokens for one in found),
    )


def _picture(seed: int, size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Noise, H×W×3 uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def _agree(speeds: list[float]) -> bool:
    if len(speeds) < 2:
        return False
    last, before = speeds[-1], speeds[-2]
    return abs(last - before) <= AGREEMENT * max(last, before)
