"""How near decode comes to the memory's limit, and what it costs in power.

Decode at batch 1 reads all weights of the language model and the request's KV cache for every
token, so bytes a token over the device's published bandwidth is a roof no kernel can pass. What
the device does not tell stays ``None``. This module knows nothing about scenarios.
"""

from __future__ import annotations

import time
from typing import Any

from molmo_edge.bench import document
from molmo_edge.bench.document import Ceiling, Environment, Row, Sample
from molmo_edge.bench.tables import part
from molmo_edge.devices import checkpoint, shapes, telemetry
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.models.hub import default_cache_dir, locate

READINGS = 5
"""Fewer power readings than this within decode say nothing about decode."""


class Meter:
    """Watches the sensors while a row runs, and fills in the row's ceiling after it."""

    def __init__(
        self, environment: Environment, shape: shapes.ModelShape | None, interval_s: float = 0.2
    ) -> None:
        self.environment = environment
        self.shape = shape
        self.interval_s = interval_s
        self._sampler: telemetry.Sampler | None = None
        self._began = 0.0

    @classmethod
    def of(cls, vlm: Any, result: document.Document) -> Meter:
        """For a started engine."""
        return cls(result.environment, shape_of(vlm))

    def start(self) -> None:
        """A row begins."""
        self._sampler = telemetry.Sampler(self.interval_s).__enter__()
        self._began = time.monotonic()

    def finish(self, row: Row) -> None:
        """The row has ended and been summarised."""
        ceiling = self._roof(row)
        if self._sampler is not None:
            self._sampler.__exit__(None, None, None)
            offset = self._began - time.monotonic() + self._sampler.summary().duration_s
            power(ceiling, row, self._sampler.summary(), self._sampler.samples, max(offset, 0.0))
            self._sampler = None
        if any(value is not None for value in ceiling.model_dump().values()):
            row.ceiling = ceiling

    def _roof(self, row: Row) -> Ceiling:
        ceiling = Ceiling()
        reached = part(row).get("output_tps")
        batch = row.conditions.get("batch", 1)
        done = [sample for sample in row.samples if sample.error is None]
        if not isinstance(batch, int) or "loop" in row.conditions or not done:
            return ceiling
        per_step = step_bytes(self.shape, self.environment, batch, _context(done))
        if per_step is None:
            return ceiling
        ceiling.bytes_per_token = per_step / batch
        bandwidth = self.environment.device.bandwidth_bytes_per_s
        if bandwidth is not None:
            ceiling.ceiling_tps = bandwidth / per_step * batch
            if reached is not None and reached.mean is not None:
                ceiling.bandwidth_share = reached.mean * per_step / bandwidth
        return ceiling


def shape_of(vlm: Any) -> shapes.ModelShape | None:
    """The shape of the engine's model, ``None`` if it cannot be known."""
    settings = getattr(vlm, "settings", None)
    if settings is None:
        return None
    try:
        root = settings.cache_dir or default_cache_dir()
        return checkpoint.model_shape(locate(settings.model, root, settings.load_format))
    except MolmoEdgeError:
        return None


def step_bytes(
    shape: shapes.ModelShape | None, environment: Environment, batch: int, context: float | None
) -> float | None:
    """Bytes of one decode step: weights once, and the KV cache of ``batch`` requests.

    ``None`` where the layout in memory is not known, or where a step gives more than a token.
    """
    model = environment.model
    kv = "bfloat16" if model.kv_cache_dtype == "auto" else model.kv_cache_dtype
    speculation = environment.other.get("speculation", "off")
    if (
        shape is None
        or context is None
        or kv is None
        or kv not in shapes.KV_DTYPES
        or speculation != "off"
    ):
        return None
    if model.dtype not in (None, "bfloat16", "float16") or model.precision is None:
        return None
    try:
        return shape.decode_bytes(model.precision) + batch * shape.kv_bytes(round(context), kv)
    except (MolmoEdgeError, KeyError):
        return None


def _context(done: list[Sample]) -> float | None:
    """Tokens a decode step sees on average: the prompt and half the answer."""
    seen = [
        s.prompt_tokens + s.output_tokens / 2
        for s in done
        if s.prompt_tokens is not None and s.output_tokens is not None
    ]
    return sum(seen) / len(seen) if seen else None


def power(
    ceiling: Ceiling,
    row: Row,
    summary: telemetry.Summary,
    readings: list[telemetry.Sample],
    offset: float = 0.0,
) -> None:
    """Fill in watts and joules: of decode alone at batch 1, of the whole row otherwise.

    ``offset`` is when the row began on the readings' clock, in seconds.
    """
    clock = summary.clocks_mhz.get("gpu")
    ceiling.gpu_mhz = clock.mean if clock else None
    slowed = summary.throttled
    ceiling.throttled = slowed.maximum > 0 if slowed else None
    done = [sample for sample in row.samples if sample.error is None]
    tokens = sum(sample.output_tokens or 0 for sample in done)
    if summary.energy_j is not None and tokens:
        ceiling.row_joules_per_token = summary.energy_j / tokens
    speed = part(row).get("output_tps")
    if row.conditions.get("batch", 1) == 1 and "loop" not in row.conditions:
        spans = [
            (s.started_s + s.ttft_s, s.started_s + s.e2e_s)
            for s in done
            if s.started_s is not None and s.ttft_s is not None and s.e2e_s is not None
        ]
        watts = [
            r.power_w
            for r in readings
            if r.power_w is not None and any(a <= r.t_s - offset <= b for a, b in spans)
        ]
        if len(watts) >= READINGS:
            ceiling.watts = sum(watts) / len(watts)
        if ceiling.watts and speed is not None and speed.mean:
            ceiling.joules_per_token = ceiling.watts / speed.mean
            ceiling.tps_per_watt = speed.mean / ceiling.watts
    elif summary.power_w is not None:
        ceiling.watts = summary.power_w.mean
        ceiling.joules_per_token = ceiling.row_joules_per_token
        if ceiling.joules_per_token:
            ceiling.tps_per_watt = 1 / ceiling.joules_per_token
