"""The roofline: the least time that bytes and arithmetic of a step can take."""

from __future__ import annotations

from dataclasses import dataclass

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.shapes import ModelShape

FORMULAS = (
    "step time ≥ max(bytes ÷ bandwidth, FLOP ÷ peak)",
    "decode: bytes = blocks + head + batch · KV of the context; FLOP = batch · (2 · matrices + "
    "attention + head)",
    "prefill: bytes = blocks; FLOP = prompt · (2 · matrices + attention over half the prompt)",
    "requests = KV memory ÷ KV of one request in whole blocks of 16 tokens; KV memory = usable "
    "memory less weights, or what the profile sets if that is less",
)


@dataclass(frozen=True)
class Roof:
    """The ceilings of one model on one device for one kind of request.

    ``kv_dtype`` is a key of ``KV_DTYPES``; ``prompt`` and ``output`` are tokens.
    """

    shape: ModelShape
    device: DeviceInfo
    bandwidth: float | None
    kv_dtype: str
    prompt: int
    output: int

    @property
    def context(self) -> int:
        """Tokens seen by a decode step on average: the prompt and half of the output."""
        return self.prompt + self.output // 2

    @property
    def kv_bytes(self) -> int:
        return self.shape.kv_bytes(self.context, self.kv_dtype)

    def peak(self, precision: str) -> float | None:
        """Published FLOP/s of the arithmetic a precision is computed in."""
        device = self.device
        capability = device.capability
        if precision == "nvfp4" and (capability is None or capability >= (10, 0)):
            return device.fp4_flops
        if precision == "fp8" and (capability is None or capability >= (8, 9)):
            return device.fp8_flops
        return device.bf16_flops  # weight-only: unpacked to BF16 before the multiplication

    def decode(self, precision: str, batch: int) -> tuple[float | None, str | None]:
        """Ceiling of all requests together in tokens per second, and what binds it."""
        if self.bandwidth is None:
            return None, None
        context, kv = self.context, self.kv_bytes
        moving = (self.shape.decode_bytes(precision) + batch * kv) / self.bandwidth
        head = 2.0 * (self.shape.head or self.shape.embedding)
        peak = self.peak(precision)
        work = 0.0
        if peak is not None:
            work = batch * (self.shape.flops_per_token(context) + head) / peak
        return batch / max(moving, work), "bandwidth" if moving >= work else "arithmetic"

    def prefill(self, precision: str) -> float | None:
        """Ceiling in prompt tokens per second."""
        peak = self.peak(precision)
        if peak is None:
            return None
        seconds = self.prompt * self.shape.flops_per_token(self.prompt // 2) / peak
        if self.bandwidth is not None:
            seconds = max(seconds, self.shape.weights(precision).blocks / self.bandwidth)
        return self.prompt / seconds

    def worked(self, precision: str) -> str | None:
        """The decode ceiling of one request with its numbers in, where bandwidth binds it."""
        tps, limit = self.decode(precision, 1)
        if tps is None or self.bandwidth is None or limit != "bandwidth":
            return None
        return (
            f"decode, {precision}: {self.bandwidth / 1e9:g} GB/s ÷ "
            f"({self.shape.decode_bytes(precision) / 1e9:.3f} GB of weights + "
            f"{self.kv_bytes / 1e9:.3f} GB of KV at {self.context} tokens) = {tps:.1f} tok/s"
        )
