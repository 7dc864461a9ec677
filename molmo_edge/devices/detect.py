"""Detect this machine: GPU or CPU, memory, clocks, power mode and published peaks.

Needs neither root nor torch and fails on no machine: what a missing source would have reported is
``None``. ``/proc/cpuinfo`` is read directly because py-cpuinfo takes over a second and starts a
process, which every start of an engine would pay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molmo_edge.devices import specs
from molmo_edge.devices.info import Clock, DeviceInfo
from molmo_edge.devices.nvml import CLOCK_GRAPHICS, CLOCK_MEMORY, Nvml, text, visible_gpu
from molmo_edge.devices.sources import Sources, system_sources

__all__ = ["DeviceInfo", "detect", "known_device", "known_devices"]

# What CPU kernels depend on: flags of /proc/cpuinfo on x86, "Features" on Arm.
_ISA: Mapping[str, str] = {
    **{flag: flag for flag in (
        "avx", "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
        "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
        "bf16", "i8mm", "sve", "sve2", "sme",
    )},
    "asimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod",
}  # fmt: skip

# "CPU part" of Arm's main ID register, as Linux's cputype.h lists them.
_ARM_CORES = {
    "0xd40": "Arm Neoverse-V1", "0xd42": "Arm Cortex-A78AE", "0xd49": "Arm Neoverse-N2",
    "0xd4f": "Arm Neoverse-V2", "0xd83": "Arm Neoverse-V3AE", "0xd85": "Arm Cortex-X925",
    "0xd87": "Arm Cortex-A725", "0x004": "NVIDIA Carmel",
}  # fmt: skip

# SoC in the device tree → compute capability of its GPU (NVIDIA's CUDA GPU list).
_SOCS = {"tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}

# devfreq nodes of the graphics clusters: nvgpu up to Orin, nvidia.ko from Thor on.
_GPU_NODES = re.compile(r"gpu-gpc-\d+|.*\.(gpu|ga10b|gv11b|gp10b)")
_GPU_FILES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/nvhost-ctrl-gpu")
_CPUFREQ = "/sys/devices/system/cpu/cpu0/cpufreq"


def detect(sources: Sources | None = None, *, gpu: bool = True) -> DeviceInfo:
    """Describe this machine, or the one that ``sources`` stand for. Raises nothing.

    Without ``gpu``, describe it as seen by a program that uses no GPU.
    """
    src = system_sources() if sources is None else sources
    if not gpu:
        src = replace(src, environ={**src.environ, "CUDA_VISIBLE_DEVICES": ""})
    board = jetson(src)
    memory = main_memory(src)
    with Nvml(src) as nvml:
        fields = _gpu(src, nvml, board, memory)
        clocks = {
            "gpu": _nvml_clock(nvml, CLOCK_GRAPHICS),
            "memory": _nvml_clock(nvml, CLOCK_MEMORY),
            "cpu": _clock(src, f"{_CPUFREQ}/scaling_cur_freq", f"{_CPUFREQ}/cpuinfo_max_freq", 1e3),
        }
    if board is not None:
        # The memory clock is in debugfs, which is readable for root only.
        emc = "/sys/kernel/debug/bpmp/debug/clk/emc"
        clocks["memory"] = _clock(src, f"{emc}/rate", f"{emc}/max_rate", 1e6) or clocks["memory"]
        if (node := gpu_devfreq(src)) is not None:
            gpu_clock = _clock(src, node / "cur_freq", node / "max_freq", 1e6)
            clocks["gpu"] = gpu_clock or clocks["gpu"]
    cpu_name, cpu_isa, cpu_count = _cpu(src)
    if fields is None:
        fields = {
            "kind": "cpu",
            "name": cpu_name or "CPU",
            "memory_total_bytes": memory[0],
            "memory_available_bytes": memory[1],
        }
    return DeviceInfo(
        **fields,
        cpu_name=cpu_name,
        cpu_isa=cpu_isa,
        cpu_count=cpu_count,
        cpu_governor=src.read(f"{_CPUFREQ}/scaling_governor") or None,
        power_mode=None if board is None else _power_mode(src),
        clocks={name: clock for name, clock in clocks.items() if clock is not None},
        jetson_model=None if board is None else board.model,
        machine=src.machine or None,
        is_wsl=_is_wsl(src),
        in_container=_in_container(src),
        gpu_count=nvml.count,
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


def known_devices() -> tuple[str, ...]:
    """Names that ``known_device`` takes."""
    return tuple(spec.key for spec in specs.SPECS)


def main_memory(src: Sources) -> tuple[int | None, int | None]:
    """Total and available main memory in bytes, within the container's limit if there is one.

    Available is the kernel's ``MemAvailable``, which counts reclaimable page cache: on an
    integrated GPU it is also what vLLM takes for free GPU memory.
    """
    total, available = src.memory() or (None, None)
    cgroup = "/sys/fs/cgroup"
    for limit_file, used_file in (
        (f"{cgroup}/memory.max", f"{cgroup}/memory.current"),
        (f"{cgroup}/memory/memory.limit_in_bytes", f"{cgroup}/memory/memory.usage_in_bytes"),
    ):
        limit = src.read_int(limit_file)  # "max", no limit, is not an integer
        if limit is None:
            continue
        if total is None or limit < total:
            total, used = limit, src.read_int(used_file)
            if used is not None:
                left = max(0, limit - used)
                available = left if available is None else min(available, left)
        break
    return total, available


@dataclass(frozen=True)
class Jetson:
    """A Jetson as its device tree describes it.

    Attributes:
        model: board name, such as "NVIDIA Jetson AGX Thor Developer Kit".
        compatible: the device tree's list, with module (p3834 …) and SoC (tegra264 …).
        capability: compute capability of the SoC's GPU.
    """

    model: str
    compatible: tuple[str, ...]
    capability: str | None


def jetson(src: Sources) -> Jetson | None:
    """The Jetson this runs on, if it is one."""
    tree = "/sys/firmware/devicetree/base"
    raw = src.read("/proc/device-tree/compatible") or src.read(f"{tree}/compatible") or ""
    compatible = tuple(part for part in raw.split("\0") if part)
    soc = next((m[1] for c in compatible if (m := re.search(r"nvidia,(tegra\d+)$", c))), None)
    if soc is None:
        return None
    model = src.read("/proc/device-tree/model") or src.read(f"{tree}/model")
    return Jetson(model or f"NVIDIA Jetson ({soc})", compatible, _SOCS.get(soc))


def gpu_devfreq(src: Sources) -> Path | None:
    """sysfs directory of the clock of a Jetson's graphics clusters."""
    nodes = src.entries("/sys/class/devfreq")
    return next((node for node in nodes if _GPU_NODES.fullmatch(node.name)), None)


def _cpu(src: Sources) -> tuple[str | None, frozenset[str], int | None]:
    """Name, instruction sets and number of logical processors."""
    fields: dict[str, list[str]] = {}
    for line in (src.read("/proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), []).append(value.strip())
    # big.LITTLE machines have different cores: count on what every core has.
    flags = [set(line.split()) for line in fields.get("flags") or fields.get("features") or [""]]
    isa = frozenset(_ISA[flag] for flag in set.intersection(*flags) & _ISA.keys())
    names = fields.get("model name", [])[:1]
    parts = dict.fromkeys(_ARM_CORES.get(part.lower()) for part in fields.get("cpu part", []))
    name = " + ".join(names or [part for part in parts if part is not None])
    return name or None, isa, len(fields.get("processor", [])) or None


def _power_mode(src: Sources) -> str | None:
    """Name of the nvpmodel mode, such as "MAXN" or "120W"."""
    answer = src.run(["nvpmodel", "-q"]) or ""
    if match := re.search(r"NV Power Mode:\s*(\S+)", answer):
        return match[1]
    status = re.search(r"pmode:(\d+)", src.read("/var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    config = src.read("/etc/nvpmodel.conf") or ""
    modes = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", config)
    return {int(number): str(name) for number, name in modes}.get(
        int(status[1]), f"mode {int(status[1])}"
    )


def _is_wsl(src: Sources) -> bool:
    release = src.read("/proc/sys/kernel/osrelease") or src.read("/proc/version") or ""
    return "microsoft" in release.lower() or "WSL_DISTRO_NAME" in src.environ


def _in_container(src: Sources) -> bool:
    files = ("/.dockerenv", "/run/.containerenv")
    if any(src.exists(file) for file in files) or src.environ.get("container"):
        return True
    groups = src.read("/proc/1/cgroup") or ""
    return any(name in groups for name in ("docker", "kubepods", "containerd", "lxc", "libpod"))


def _clock(src: Sources, now: str | Path, top: str | Path, per_mhz: float) -> Clock | None:
    current, maximum = (
        None if value is None else round(value / per_mhz)
        for value in (src.read_int(now), src.read_int(top))
    )
    return None if current is None and maximum is None else (current, maximum)


def _nvml_clock(nvml: Nvml, kind: int) -> Clock | None:
    current = nvml.number("nvmlDeviceGetClockInfo", kind)
    maximum = nvml.number("nvmlDeviceGetMaxClockInfo", kind)
    return None if current is None and maximum is None else (current, maximum)


def _gpu(
    src: Sources, nvml: Nvml, board: Jetson | None, main: tuple[int | None, int | None]
) -> dict[str, Any] | None:
    """Fields of the GPU that this process can use, ``None`` if it has none."""
    if visible_gpu(src) is None:
        return None
    name = text(nvml.device("nvmlDeviceGetName")) or _proc_gpu_name(src)
    present = board is not None and any(src.exists(file) for file in _GPU_FILES)
    if nvml.handle is None and name is None and not present:
        return None
    spec = None
    if board is not None:
        spec = specs.spec_of_jetson(" ".join((board.model, *board.compatible)), main[0])
    elif name is not None:
        spec = specs.spec_of_gpu(name)
    assumed: list[str] = []
    capability = _capability(nvml) or (None if board is None else board.capability)
    if capability is None and spec is not None:
        capability = spec.capability
        assumed.append("compute_capability")
    memory = nvml.device("nvmlDeviceGetMemoryInfo")
    total, free = (_positive(getattr(memory, part, None)) for part in ("total", "free"))
    integrated: bool | None
    if board is not None or spec is not None:
        integrated = board is not None or (spec is not None and spec.integrated)
    elif total is not None:
        integrated = False
    else:  # GPUs on shared memory report their name, but no memory
        integrated = True if nvml.handle is not None and src.machine == "aarch64" else None
    if integrated:
        total, free = main
    elif total is None and spec is not None:
        total = round(spec.memory_gib * specs.GIB)
        assumed.append("memory_total_bytes")
    enforced = nvml.number("nvmlDeviceGetEnforcedPowerLimit")
    default = nvml.number("nvmlDeviceGetPowerManagementDefaultLimit")
    limits = tuple(None if limit is None else limit / 1000 for limit in (enforced, default))
    cuda = _positive(nvml.get("nvmlSystemGetCudaDriverVersion_v2")) if nvml.handle else None
    driver = nvml.get("nvmlSystemGetDriverVersion") if nvml.handle else None
    return {
        "kind": "cuda",
        "name": name or (board.model if board is not None else "NVIDIA GPU"),
        "compute_capability": capability,
        "integrated": integrated,
        "memory_total_bytes": total,
        "memory_available_bytes": free,
        "driver": text(driver) or _proc_driver(src),
        "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        "power_limit_w": None if limits == (None, None) else limits,
        "gpu_index": nvml.index,
        "assumed": tuple(assumed),
        **_figures(spec),
    }


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


def _capability(nvml: Nvml) -> str | None:
    try:
        major, minor = nvml.device("nvmlDeviceGetCudaComputeCapability")
        return f"{int(major)}.{int(minor)}"
    except (TypeError, ValueError):
        return None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _proc_gpu_name(src: Sources) -> str | None:
    """Name of the first GPU that the kernel driver lists, for containers without NVML."""
    for gpu in src.entries("/proc/driver/nvidia/gpus"):
        match = re.search(r"^Model:\s*(.+)$", src.read(gpu / "information") or "", re.MULTILINE)
        if match and src.exists("/dev/nvidia0"):
            return match[1].strip()
    return None


def _proc_driver(src: Sources) -> str | None:
    version = src.read("/proc/driver/nvidia/version") or ""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", version)
    return match[1] if match else None
