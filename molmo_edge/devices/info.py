"""Description of one machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Clock = tuple[int, int]


@dataclass(frozen=True)
class DeviceInfo:
    """Description of one machine; ``None`` means unknown, never zero.

    Attributes:
        name: the GPU's name from NVML, else the processor's.
        kind: "cuda" if this process can use an NVIDIA GPU, else "cpu".
        compute_capability: such as "11.0".
        integrated: whether GPU and CPU share their memory.
        memory_total_bytes, memory_available_bytes: GPU memory, or main memory (within the
            container's limit) where the GPU is integrated or absent.
        memory_bandwidth_bytes_s: published peak, bytes per second.
        bf16_flops, fp8_flops, fp4_flops: published dense peaks with FP32 accumulation, FLOP/s.
        known_as: the name that ``known_device`` takes for it.
        figures_source: where bandwidth and FLOP/s are published.
        driver, cuda: NVIDIA driver version, and the newest CUDA version it supports.
        cpu_name, cpu_isa, cpu_count: processor (x86 only), its instruction sets as in /proc/cpuinfo
            (empty when unknown), and the number of logical processors.
        cpu_governor: cpufreq governor of the first core.
        power_mode: nvpmodel mode of a Jetson, such as "MAXN".
        power_limit_w: (enforced, default) board power limit in watts.
        clocks: name ("gpu", "memory", "cpu") to (current, maximum) in MHz.
        jetson_model: board name from the device tree.
        machine: architecture as ``uname -m`` prints it.
        is_wsl, in_container: whether this process runs in WSL, in a container.
        nvml_error: NVML's error message if it is installed and failed.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    compute_capability: str | None = None
    integrated: bool | None = None
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    memory_bandwidth_bytes_s: float | None = None
    bf16_flops: float | None = None
    fp8_flops: float | None = None
    fp4_flops: float | None = None
    known_as: str | None = None
    figures_source: str | None = None
    driver: str | None = None
    cuda: str | None = None
    cpu_name: str | None = None
    cpu_isa: frozenset[str] = frozenset()
    cpu_count: int | None = None
    cpu_governor: str | None = None
    power_mode: str | None = None
    power_limit_w: tuple[float, float] | None = None
    clocks: Mapping[str, Clock] = field(default_factory=dict)
    jetson_model: str | None = None
    machine: str | None = None
    is_wsl: bool = False
    in_container: bool = False
    nvml_error: str | None = None

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
