"""What this machine is: GPU or CPU, its memory, clocks, power mode and published peaks.

``detect`` needs neither root nor torch and fails on no machine: every source may be missing, and
what it would have told is then ``None``. It does not know profiles, models or vLLM.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from molmo_edge.devices import host, specs
from molmo_edge.devices import jetson as tegra
from molmo_edge.devices.info import Clock, DeviceInfo
from molmo_edge.devices.nvml import CLOCK_GRAPHICS, CLOCK_MEMORY, Nvml, gpus_hidden, text
from molmo_edge.devices.sources import Sources, system_sources

__all__ = ["DeviceInfo", "detect", "known_device", "known_devices"]


def detect(sources: Sources | None = None, *, gpu: bool = True) -> DeviceInfo:
    """This machine, or the one that ``sources`` stand for. Raises nothing.

    Without ``gpu`` it is the machine as a program sees it that uses no GPU.
    """
    src = system_sources() if sources is None else sources
    if not gpu:
        src = replace(src, environ={**src.environ, "CUDA_VISIBLE_DEVICES": ""})
    board = tegra.jetson(src)
    name, isa, count = host.cpu(src)
    total, available = host.memory(src)
    cpu_clock = host.cpu_clock(src)
    common: dict[str, Any] = {
        "cpu_name": name,
        "cpu_isa": isa,
        "cpu_count": count,
        "cpu_governor": host.cpu_governor(src),
        "jetson_model": None if board is None else board.model,
        "power_mode": None if board is None else tegra.power_mode(src),
        "machine": src.machine or None,
        "is_wsl": host.is_wsl(src),
        "in_container": host.in_container(src),
    }
    clocks: dict[str, Clock] = {} if board is None else tegra.clocks(src)
    if cpu_clock is not None:
        clocks["cpu"] = cpu_clock
    with Nvml(src) as nvml:
        found = _gpu(src, nvml, board, total, available)
        if found is not None:
            clocks = _nvml_clocks(nvml) | clocks
        common["nvml_error"] = nvml.error
        common["gpu_count"] = nvml.count
    common["clocks"] = MappingProxyType(clocks)
    if found is not None:
        return DeviceInfo(kind="cuda", **found, **common)
    return DeviceInfo(
        name=name or "CPU",
        kind="cpu",
        memory_total_bytes=total,
        memory_available_bytes=available,
        **common,
    )


def known_device(name: str) -> DeviceInfo:
    """A device for planning, by name: "thor", "rtx5080", "spark", "orin", "h100" and others.

    Only published figures are set; memory is the nominal size.

    Raises:
        ConfigError: the name is not known; the message lists those that are.
    """
    spec = specs.spec_named(name)
    return DeviceInfo(
        name=spec.name,
        kind="cuda",
        compute_capability=spec.capability,
        integrated=spec.integrated,
        memory_total_bytes=round(spec.memory_gib * specs.GIB),
        jetson_model=spec.name if spec.name.startswith("NVIDIA Jetson") else None,
        **_figures(spec),
    )


def known_devices() -> tuple[str, ...]:
    """Names that ``known_device`` takes."""
    return tuple(spec.key for spec in specs.SPECS)


def _gpu(
    src: Sources,
    nvml: Nvml,
    board: tegra.Jetson | None,
    ram_total: int | None,
    ram_available: int | None,
) -> dict[str, Any] | None:
    """Fields of the GPU this process can use, ``None`` if it has none."""
    if gpus_hidden(src):
        return None
    name = nvml.device("nvmlDeviceGetName")
    name = text(name) if name is not None else _proc_gpu_name(src)
    if nvml.handle is None and name is None and not (board and tegra.gpu_present(src)):
        return None
    spec = None
    if board is not None:
        identity = " ".join((board.model, *board.compatible))
        spec = specs.spec_of_jetson(identity, ram_total)
    elif name is not None:
        spec = specs.spec_of_gpu(name)
    assumed: list[str] = []
    capability = _capability(nvml) or (board.capability if board is not None else None)
    if capability is None and spec is not None:
        capability = spec.capability
        assumed.append("compute_capability")
    memory = nvml.device("nvmlDeviceGetMemoryInfo")
    total, free = _positive(memory, "total"), _positive(memory, "free")
    integrated = _integrated(src, board, spec, nvml.handle is not None, total)
    if integrated:
        total, free = ram_total, ram_available
    elif total is None and spec is not None:
        total = round(spec.memory_gib * specs.GIB)
        assumed.append("memory_total_bytes")
    driver = nvml.get("nvmlSystemGetDriverVersion") if nvml.handle is not None else None
    limits = tuple(
        None if milliwatts is None else milliwatts / 1000
        for milliwatts in (
            nvml.number("nvmlDeviceGetEnforcedPowerLimit"),
            nvml.number("nvmlDeviceGetPowerManagementDefaultLimit"),
        )
    )
    fallback = board.model if board is not None else None
    return {
        "name": name or fallback or "NVIDIA GPU",
        "compute_capability": capability,
        "integrated": integrated,
        "memory_total_bytes": total,
        "memory_available_bytes": free,
        "driver": text(driver) if driver is not None else _proc_driver(src),
        "cuda": _cuda(nvml),
        "power_limit_w": None if limits == (None, None) else limits,
        "gpu_index": nvml.index,
        "assumed": tuple(assumed),
        **_figures(spec),
    }


def _figures(spec: specs.Spec | None) -> dict[str, Any]:
    if spec is None:
        return {}

    def flops(tera: float | None) -> float | None:
        return None if tera is None else tera * 1e12

    return {
        "known_as": spec.key,
        "memory_bandwidth_bytes_s": spec.bandwidth_gb_s * 1e9,
        "bf16_flops": flops(spec.bf16_tflops),
        "fp8_flops": flops(spec.fp8_tflops),
        "fp4_flops": flops(spec.fp4_tflops),
        "figures_source": spec.source,
    }


def _capability(nvml: Nvml) -> str | None:
    value = nvml.device("nvmlDeviceGetCudaComputeCapability")
    try:
        major, minor = value
        return f"{int(major)}.{int(minor)}"
    except (TypeError, ValueError):
        return None


def _integrated(
    src: Sources,
    board: tegra.Jetson | None,
    spec: specs.Spec | None,
    nvml_works: bool,
    memory_total: int | None,
) -> bool | None:
    if board is not None:
        return True
    if spec is not None:
        return spec.integrated
    if memory_total is not None:
        return False
    # NVML knows the GPU but not its memory: that is how GPUs on shared memory answer.
    return True if nvml_works and src.machine == "aarch64" else None


def _nvml_clocks(nvml: Nvml) -> dict[str, Clock]:
    kinds = {"gpu": nvml.clock(CLOCK_GRAPHICS), "memory": nvml.clock(CLOCK_MEMORY)}
    return {name: clock for name, clock in kinds.items() if clock is not None}


def _cuda(nvml: Nvml) -> str | None:
    version = nvml.get("nvmlSystemGetCudaDriverVersion_v2") if nvml.handle is not None else None
    if not isinstance(version, int) or version <= 0:
        return None
    return f"{version // 1000}.{version % 1000 // 10}"


def _positive(memory: Any, attribute: str) -> int | None:
    value = getattr(memory, attribute, None)
    return value if isinstance(value, int) and value > 0 else None


def _proc_gpu_name(src: Sources) -> str | None:
    """Name of the first GPU the kernel driver lists, for containers that lack NVML."""
    for gpu in src.entries("/proc/driver/nvidia/gpus"):
        found = re.search(r"^Model:\s*(.+)$", src.read(gpu / "information") or "", re.MULTILINE)
        if found and src.exists("/dev/nvidia0"):
            return found[1].strip()
    return None


def _proc_driver(src: Sources) -> str | None:
    version = src.read("/proc/driver/nvidia/version") or ""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", version)
    return found[1] if found else None
