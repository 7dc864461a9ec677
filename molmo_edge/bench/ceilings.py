"""How near decode comes to the memory's limit, and what a row costs in power.

Decode at batch 1 reads all weights of the language model and the request's KV cache for every
token, so the device's published bandwidth over the bytes per token bounds the speed of any kernel.
What the device does not report stays ``None``.
"""

from __future__ import annotations

from statistics import fmean

from molmo_edge.bench.document import Ceiling, Environment, Row
from molmo_edge.devices import shapes
from molmo_edge.devices.telemetry import TelemetrySummary
from molmo_edge.errors import MolmoEdgeError


def of(
    row: Row, environment: Environment, shape: shapes.ModelShape | None, telemetry: TelemetrySummary
) -> Ceiling:
    """The ceiling of a summarised row during which the sensors were read."""
    ceiling = Ceiling(
        watts=telemetry.power_w, gpu_mhz=telemetry.gpu_mhz, throttled=telemetry.throttled
    )
    tokens = sum(sample.output_tokens or 0 for sample in row.succeeded)
    if telemetry.energy_j is not None and tokens:
        ceiling.joules_per_token = telemetry.energy_j / tokens
    # Of concurrent users it is not known how many requests a step serves.
    batch = None if "users" in row.conditions else row.conditions.get("batch", 1)
    # A decode step sees, on average, the prompt and half the answer.
    context = [
        s.prompt_tokens + s.output_tokens / 2
        for s in row.succeeded
        if s.prompt_tokens is not None and s.output_tokens is not None
    ]
    if shape is None or not isinstance(batch, int) or not context:
        return ceiling
    step = step_bytes(shape, environment, batch, fmean(context))
    if step is None:
        return ceiling
    ceiling.bytes_per_token = step / batch
    bandwidth = environment.device.memory_bandwidth_bytes_s
    reached = row.summary("output_tps").mean
    if bandwidth is not None and reached is not None:
        ceiling.bandwidth_share = reached * step / bandwidth
    return ceiling


def step_bytes(
    shape: shapes.ModelShape, environment: Environment, batch: int, context: float
) -> float | None:
    """Bytes of one decode step: the weights once, and the KV cache of ``batch`` requests.

    ``None`` where the layout in memory is not known, or a step may give more than one token.
    """
    model, scale = environment.model, 1
    precision, kv = model.precision, model.kv_cache_dtype
    if environment.other.get("speculation", "off") != "off":
        return None
    if model.dtype == "float32":
        # Known where nothing is quantised: all of it takes twice the bytes of BF16.
        if (precision, kv) != ("fp32", "auto"):
            return None
        precision, scale = "bf16", 2
    if precision is None or kv is None or kv not in shapes.KV_DTYPES:
        return None
    try:
        weights = shape.decode_bytes(precision)
    except MolmoEdgeError:
        return None
    return scale * (weights + batch * shape.kv_bytes(round(context), kv))
