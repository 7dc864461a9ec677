"""How near decode comes to the memory's limit, and what it costs in power.

Decode at batch 1 reads all weights of the language model and the request's KV cache for every
token, so the device's published bandwidth over the bytes per token bounds the speed of any kernel.
What the device does not report stays ``None``.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from molmo_edge.bench.document import Ceiling, Environment, Row
from molmo_edge.devices import shapes
from molmo_edge.devices.caches import default_cache_dir
from molmo_edge.devices.telemetry import Sampler
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.models.hub import locate

MIN_READINGS = 5
"""Fewer power readings than this within decode say nothing about decode."""


def of(row: Row, environment: Environment, vlm: Any, sampler: Sampler) -> Ceiling:
    """The ceiling of a summarised row; the sampler started with it."""
    ceiling = Ceiling()
    add_bandwidth(ceiling, row, environment, shape_of(vlm))
    add_power(ceiling, row, sampler)
    return ceiling


def shape_of(vlm: Any) -> shapes.ModelShape | None:
    """The shape of the engine's model, ``None`` if it cannot be known or there is no engine."""
    if vlm is None:
        return None
    settings = vlm.settings
    try:
        root = settings.cache_dir or default_cache_dir()
        return shapes.model_shape(locate(settings.model, root, settings.load_format))
    except MolmoEdgeError:
        return None


def add_bandwidth(
    ceiling: Ceiling, row: Row, environment: Environment, shape: shapes.ModelShape | None
) -> None:
    """Fill in bytes per token, and the speed and share that follow from the bandwidth."""
    batch = row.conditions.get("batch", 1)
    # A decode step sees, on average, the prompt and half the answer.
    context = [
        s.prompt_tokens + s.output_tokens / 2
        for s in row.succeeded
        if s.prompt_tokens is not None and s.output_tokens is not None
    ]
    if not isinstance(batch, int) or "loop" in row.conditions or not context:
        return
    step = step_bytes(shape, environment, batch, fmean(context))
    if step is None:
        return
    ceiling.bytes_per_token = step / batch
    bandwidth = environment.device.bandwidth_bytes_per_s
    reached = row.summary("output_tps").mean
    if bandwidth is not None:
        ceiling.ceiling_tps = bandwidth / step * batch
        ceiling.bandwidth_share = None if reached is None else reached * step / bandwidth


def step_bytes(
    shape: shapes.ModelShape | None, environment: Environment, batch: int, context: float
) -> float | None:
    """Bytes of one decode step: the weights once, and the KV cache of ``batch`` requests.

    ``None`` where the layout in memory is not known, or a step may give more than one token.
    """
    model, scale = environment.model, 1
    precision, kv = model.precision, model.kv_cache_dtype
    if shape is None or environment.other.get("speculation", "off") != "off":
        return None
    if model.dtype == "float32":
        # Known where nothing is quantised: all of it takes twice the bytes of BF16.
        if (precision, kv) != ("fp32", "auto"):
            return None
        precision, scale = "bf16", 2
    kv = "bfloat16" if kv == "auto" else kv
    if precision is None or kv is None or kv not in shapes.KV_DTYPES:
        return None
    try:
        weights = shape.decode_bytes(precision)
    except MolmoEdgeError:
        return None
    return scale * (weights + batch * shape.kv_bytes(round(context), kv))


def add_power(ceiling: Ceiling, row: Row, sampler: Sampler) -> None:
    """Fill in watts and joules: of decode alone at batch 1, of the whole row otherwise."""
    summary = sampler.summary()
    ceiling.gpu_mhz, ceiling.throttled = summary.gpu_mhz, summary.throttled
    tokens = sum(sample.output_tokens or 0 for sample in row.succeeded)
    if summary.energy_j is not None and tokens:
        ceiling.row_joules_per_token = summary.energy_j / tokens
    if row.conditions.get("batch", 1) == 1 and "loop" not in row.conditions:
        spans = [
            (s.started_s + s.ttft_s, s.started_s + s.e2e_s)
            for s in row.succeeded
            if s.started_s is not None and s.ttft_s is not None and s.e2e_s is not None
        ]
        watts = [
            reading.power_w
            for reading in sampler.readings
            if reading.power_w is not None and any(a <= reading.t_s <= b for a, b in spans)
        ]
        speed = row.summary("output_tps").mean
        if len(watts) >= MIN_READINGS:
            ceiling.watts = fmean(watts)
            ceiling.joules_per_token = ceiling.watts / speed if speed else None
    elif summary.power_w is not None:
        ceiling.watts = summary.power_w
        ceiling.joules_per_token = ceiling.row_joules_per_token
    if ceiling.joules_per_token:
        ceiling.tps_per_watt = 1 / ceiling.joules_per_token
