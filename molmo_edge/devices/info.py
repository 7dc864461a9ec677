"""Description of one machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Clock = tuple[int, int]  # current and maximum MHz


@dataclass(frozen=True)
class DeviceInfo:
    """Description of one machine; ``None`` means unknown, never zero."""

    name: str  # the GPU's by NVML, else the processor's
    kind: Literal["cuda", "cpu"]  # "cuda" if this process can use an NVIDIA GPU
    compute_capability: str | None = None  # such as "11.0"
    integrated: bool | None = None  # whether GPU and CPU share their memory
    # Of the GPU, or main memory (within the container's limit) where it is integrated or absent.
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    # Published peaks, dense and with FP32 accumulation, their row in `specs` and their source.
    memory_bandwidth_bytes_s: float | None = None
    bf16_flops: float | None = None
    fp8_flops: float | None = None
    fp4_flops: float | None = None
    known_as: str | None = None
    figures_source: str | None = None
    driver: str | None = None
    cuda: str | None = None  # the newest CUDA version that the driver supports
    cpu_isa: frozenset[str] = frozenset()  # names of /proc/cpuinfo; empty when unknown
    cpu_count: int | None = None  # logical processors
    cpu_governor: str | None = None  # of the first core
    power_mode: str | None = None  # nvpmodel's, such as "MAXN"
    power_limit_w: tuple[float, float] | None = None  # enforced, default
    clocks: Mapping[str, Clock] = field(default_factory=dict)  # "gpu", "memory", "cpu"
    jetson_model: str | None = None  # board name from the device tree
    machine: str | None = None  # as ``uname -m`` prints it
    is_wsl: bool = False
    in_container: bool = False
    nvml_error: str | None = None  # NVML's message if it failed

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability as (major, minor)."""
        if self.compute_capability is None:
            return None
        major, _, minor = self.compute_capability.partition(".")
        return int(major), int(minor)

    @property
    def sm(self) -> str | None:
        """Architecture as compilers name it, such as "sm_110"."""
        return None if self.capability is None else "sm_{}{}".format(*self.capability)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=sorted))
        return plain
