"""Detect this machine: GPU or CPU, memory, clocks, power mode and published peaks.

Needs neither root nor torch and fails on no machine: what a missing source would have reported is
``None``. ``/proc/cpuinfo`` is read directly because py-cpuinfo takes over a second and starts a
process, which every start of an engine would pay.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from molmo_edge.devices import specs
from molmo_edge.devices.info import Clock, DeviceInfo
from molmo_edge.devices.nvml import CLOCK_GRAPHICS, CLOCK_MEMORY, Nvml, visible_gpu
from molmo_edge.devices.sources import Sources, system_sources

__all__ = ["DeviceInfo", "detect", "known_device"]

# What CPU kernels depend on: "flags" of /proc/cpuinfo on x86, "Features" on Arm.
_ISA = frozenset(
    "avx avx2 f16c fma avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_bf16 amx_int8 asimd asimdhp asimddp bf16 i8mm sve sve2 sme".split()
)
# SoC in the device tree → compute capability of its GPU (NVIDIA's CUDA GPU list).
_SOCS = {"tegra234": "8.7", "tegra264": "11.0"}
# devfreq nodes of the graphics clusters: Thor's, and Orin's in JetPack 5 and 6.
_GPU_CLOCKS = re.compile(r"gpu-gpc-0|17000000\.(gpu|ga10b)")
_JETSON_GPUS = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/nvhost-ctrl-gpu")
_CPUFREQ = "/sys/devices/system/cpu/cpu0/cpufreq"


def detect(sources: Sources | None = None, *, gpu: bool = True) -> DeviceInfo:
    """Describe this machine, or the one that ``sources`` stand for. Raises nothing.

    Without ``gpu``, describe it as seen by a program that uses no GPU.
    """
    src = system_sources() if sources is None else sources
    if not gpu:
        src = replace(src, environ={**src.environ, "CUDA_VISIBLE_DEVICES": ""})
    total, available = main_memory(src)
    cpu_name, cpu_isa, cpu_count = _cpu(src)
    board = _jetson(src)
    fields: dict[str, Any] = {
        "name": cpu_name or f"{src.machine} CPU".strip(),
        "kind": "cpu",
        "memory_total_bytes": total,
        "memory_available_bytes": available,
    }
    with Nvml(src) as nvml:
        clocks = _clocks(src, nvml)
        fields |= _gpu(src, nvml, board, total)
    return DeviceInfo(
        **fields,
        cpu_isa=cpu_isa,
        cpu_count=cpu_count,
        cpu_governor=src.read(f"{_CPUFREQ}/scaling_governor") or None,
        power_mode=_power_mode(src),
        clocks=clocks,
        jetson_model=None if board is None else board[0],
        machine=src.machine or None,
        is_wsl="microsoft" in (src.read("/proc/sys/kernel/osrelease") or "").lower(),
        in_container=src.exists("/.dockerenv") or src.exists("/run/.containerenv"),
        nvml_error=nvml.error,
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
        jetson_model=spec.name if spec.is_jetson else None,
        **_figures(spec),
    )


def main_memory(src: Sources) -> tuple[int | None, int | None]:
    """Total and available main memory in bytes, within the container's limit if there is one.

    Available is the kernel's ``MemAvailable``, which counts reclaimable page cache: on an
    integrated GPU it is also what vLLM takes for free GPU memory.
    """
    memory = src.memory()
    if memory is None:
        return None, None
    total, available = memory
    limit = src.read_int("/sys/fs/cgroup/memory.max")  # "max", no limit, is not an integer
    if limit is not None and limit < total:
        used = src.read_int("/sys/fs/cgroup/memory.current") or 0
        return limit, min(available, max(0, limit - used))
    return total, available


def gpu_devfreq(src: Sources) -> Path | None:
    """sysfs directory of the clock of a Jetson's graphics clusters."""
    nodes = src.entries("/sys/class/devfreq")
    return next((node for node in nodes if _GPU_CLOCKS.fullmatch(node.name)), None)


def _jetson(src: Sources) -> tuple[str, str] | None:
    """Name of the Jetson board, and the device tree's names of module (p3834 …) and SoC."""
    compatible = (src.read("/proc/device-tree/compatible") or "").replace("\0", " ")
    if "nvidia,tegra" not in compatible:
        return None
    return src.read("/proc/device-tree/model") or "NVIDIA Jetson", compatible


def _cpu(src: Sources) -> tuple[str | None, frozenset[str], int | None]:
    """Name (x86 only), instruction sets and number of logical processors."""
    fields: dict[str, list[str]] = {}
    for line in (src.read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), []).append(value.strip())
    # Cores differ on big.LITTLE machines: count on what every core has.
    flags = [set(line.split()) for line in fields.get("flags") or fields.get("features") or [""]]
    isa = _ISA.intersection(*flags)
    name = fields.get("model name", [None])[0]
    return name, isa, len(fields.get("processor", [])) or None


def _power_mode(src: Sources) -> str | None:
    """Name of a Jetson's nvpmodel mode, such as "MAXN" or "120W"."""
    status = re.search(r"pmode:(\d+)", src.read("/var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    config = src.read("/etc/nvpmodel.conf") or ""
    mode = re.search(rf"<\s*POWER_MODEL\s+ID={int(status[1])}\s+NAME=(\S+?)\s*>", config)
    return mode[1] if mode else f"mode {int(status[1])}"


def _clocks(src: Sources, nvml: Nvml) -> dict[str, Clock]:
    """Current and maximum MHz of each clock that is reported."""
    found: dict[str, tuple[int | None, int | None]] = {
        name: (
            nvml.device("nvmlDeviceGetClockInfo", kind),
            nvml.device("nvmlDeviceGetMaxClockInfo", kind),
        )
        for name, kind in {"gpu": CLOCK_GRAPHICS, "memory": CLOCK_MEMORY}.items()
    }
    files: dict[str, tuple[str | Path, str | Path, float]] = {
        "cpu": (f"{_CPUFREQ}/scaling_cur_freq", f"{_CPUFREQ}/cpuinfo_max_freq", 1e-3)
    }
    if (node := gpu_devfreq(src)) is not None:
        files["gpu"] = (node / "cur_freq", node / "max_freq", 1e-6)
    for name, (current, maximum, mhz) in files.items():
        values = [src.read_int(current), src.read_int(maximum)]
        now, top = (None if value is None else round(value * mhz) for value in values)
        found[name] = (now, top)
    return {
        name: (now, top)
        for name, (now, top) in found.items()
        if now is not None and top is not None
    }


def _gpu(
    src: Sources, nvml: Nvml, board: tuple[str, str] | None, main_total: int | None
) -> dict[str, Any]:
    """Fields of the GPU that this process can use; empty if it has none."""
    present = visible_gpu(src) is not None and any(src.exists(file) for file in _JETSON_GPUS)
    if nvml.handle is None and not (board and present):  # Jetsons work without NVML
        return {}
    model, compatible = board or ("NVIDIA GPU", "")
    name = nvml.device("nvmlDeviceGetName") or model
    spec = specs.find_spec(name, f"{model} {compatible}", main_total)
    if (capability := nvml.device("nvmlDeviceGetCudaComputeCapability")) is not None:
        capability = "{}.{}".format(*capability)
    else:
        capability = next((cc for soc, cc in _SOCS.items() if soc in compatible), None)
    memory = nvml.device("nvmlDeviceGetMemoryInfo")
    if spec is not None:
        integrated = spec.integrated
    else:  # GPUs on shared memory report no memory of their own
        integrated = board is not None or memory is None
    fields = {
        "kind": "cuda",
        "name": name,
        "compute_capability": capability,
        "integrated": integrated,
        "driver": nvml.get("nvmlSystemGetDriverVersion"),
        **_figures(spec),
    }
    if not integrated and memory is not None:
        fields |= {"memory_total_bytes": memory.total, "memory_available_bytes": memory.free}
    if (cuda := nvml.get("nvmlSystemGetCudaDriverVersion_v2")) is not None:
        fields["cuda"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
    enforced = nvml.device("nvmlDeviceGetEnforcedPowerLimit")
    default = nvml.device("nvmlDeviceGetPowerManagementDefaultLimit")
    if enforced is not None and default is not None:
        fields["power_limit_w"] = (enforced / 1000, default / 1000)
    return fields


def _figures(spec: specs.Spec | None) -> dict[str, Any]:
    if spec is None:
        return {}
    peaks = {"bf16": spec.bf16_tflops, "fp8": spec.fp8_tflops, "fp4": spec.fp4_tflops}
    return {
        "known_as": spec.key,
        "memory_bandwidth_bytes_s": spec.bandwidth_gb_s * 1e9,
        "figures_source": spec.source,
        **{f"{k}_flops": None if tera is None else tera * 1e12 for k, tera in peaks.items()},
    }
