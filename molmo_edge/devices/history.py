"""Published measurements of Molmo on edge devices, as shares of what the hardware allows."""

from __future__ import annotations

from dataclasses import dataclass

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.shapes import ModelShape


@dataclass(frozen=True)
class Baseline:
    """One figure of the 2025-12-08 report: Molmo-7B-D served over HTTP by vLLM 0.6.3.post1.

    ``tps`` is output tokens divided by the whole request's time, HTTP and prefill included, so it
    lies below the decode speed it is compared with. ``precision`` is what the weights had.
    """

    device: str
    label: str
    tps: float
    precision: str


BASELINES = (
    Baseline("thor", "2025 report, best run, BF16 weights", 14.0, "bf16"),
    Baseline("thor", "2025 report, mean of 30 runs, BF16 weights", 11.1, "bf16"),
    Baseline("rtx5080", "2025 report, mean, 4-bit bitsandbytes weights", 103.8, "nf4"),
)

_CONTEXT = 1210 + 185 // 2  # its requests: about 1,210 prompt and 69 to 300 output tokens


@dataclass(frozen=True)
class Share:
    """A measurement, the decode ceiling of the same weights, and the ratio of the two."""

    label: str
    tps: float
    ceiling_tps: float
    share: float


def shares(
    shape: ModelShape, device: DeviceInfo, bandwidth_bytes_s: float | None
) -> tuple[Share, ...]:
    """The report's figures for this device; empty for another device or another model."""
    same = shape.family == "molmo" and (shape.layers, shape.heads, shape.kv_heads) == (28, 28, 4)
    if not same or shape.stored is not None or bandwidth_bytes_s is None:
        return ()
    found = []
    for baseline in BASELINES:
        if baseline.device == device.known_as:
            step = shape.decode_bytes(baseline.precision) + shape.kv_bytes(_CONTEXT, "fp8")
            ceiling = bandwidth_bytes_s / step
            found.append(Share(baseline.label, baseline.tps, ceiling, baseline.tps / ceiling))
    return tuple(found)
