"""Detect this machine: GPU or CPU, memory and its bandwidth, clocks, power mode.

Needs neither root nor torch and fails on no machine. ``/proc/cpuinfo`` is read directly because
py-cpuinfo takes over a second and starts a process, which every start of an engine would pay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from molmo_edge.devices.sources import CLOCK_GRAPHICS, CLOCK_MEMORY, Nvml, Sources, system_sources
from molmo_edge.devices.specs import GIB, Spec, find_spec, spec_named

# What CPU kernels depend on: "flags" of /proc/cpuinfo on x86, "Features" on Arm.
_ISA = frozenset(
    "avx avx2 f16c fma avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_bf16 amx_int8 asimd asimdhp asimddp bf16 i8mm sve sve2 sme".split()
)
# SoC in the device tree → compute capability of its GPU, for boards that are not NVIDIA's own.
_SOCS = {"tegra234": "8.7", "tegra264": "11.0"}
# devfreq nodes of the graphics clusters: Thor's, and Orin's in JetPack 5 and 6.
_GPU_CLOCKS = re.compile(r"gpu-gpc-0|17000000\.(gpu|ga10b)")
_JETSON_GPUS = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/nvhost-ctrl-gpu")
_CPUFREQ = "/sys/devices/system/cpu/cpu0/cpufreq"


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
    memory_bandwidth_bytes_s: float | None = None  # published, by `bandwidth_source`
    bandwidth_source: str | None = None
    driver: str | None = None
    cuda: str | None = None  # the newest CUDA version that the driver supports
    cpu_isa: frozenset[str] = frozenset()  # names of /proc/cpuinfo; empty when unknown
    cpu_count: int | None = None  # logical processors
    cpu_governor: str | None = None  # of the first core
    power_mode: str | None = None  # nvpmodel's, such as "MAXN"
    power_limit_w: float | None = None  # the one enforced
    clocks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Current and maximum MHz of "gpu", "memory" and "cpu", where reported."""
    jetson_model: str | None = None  # board name from the device tree
    machine: str | None = None  # as ``uname -m`` prints it
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

    @property
    def summary(self) -> str:
        """Name, architecture and memory in a line, for people."""
        memory = {None: "memory unknown", True: "shared memory", False: "memory of its own"}
        size = self.memory_total_bytes
        traits = [self.name, self.sm or "capability unknown", memory[self.integrated]]
        return ", ".join(traits if size is None else [*traits, f"{size / GIB:.1f} GiB"])

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=sorted))
        return plain


def detect(sources: Sources | None = None, *, gpu: bool = True) -> DeviceInfo:
    """Describe this machine, or the one that ``sources`` stand for. Raises nothing.

    Without ``gpu``, describe it as seen by a program that uses no GPU.
    """
    src = system_sources() if sources is None else sources
    if not gpu:
        src = replace(src, environ={**src.environ, "CUDA_VISIBLE_DEVICES": ""})
    total, available = _main_memory(src)
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
        fields |= _gpu(src, nvml, board)
    return DeviceInfo(
        **fields,
        cpu_isa=cpu_isa,
        cpu_count=cpu_count,
        cpu_governor=src.read(f"{_CPUFREQ}/scaling_governor") or None,
        power_mode=_power_mode(src),
        clocks=clocks,
        jetson_model=None if board is None else board[0],
        machine=src.machine or None,
        in_container=src.exists("/.dockerenv") or src.exists("/run/.containerenv"),
        nvml_error=nvml.error,
    )


def known_device(name: str) -> DeviceInfo:
    """A device for planning, by name: "thor", "rtx5080", "spark", "orin", "h100" and others.

    Only published figures are set; memory is the nominal size. Raises ConfigError, which lists the
    known names, for any other.
    """
    spec = spec_named(name)
    return DeviceInfo(
        name=spec.name,
        kind="cuda",
        memory_total_bytes=round(spec.memory_gib * GIB),
        jetson_model=spec.name if spec.jetson else None,
        **_published(spec),
    )


def gpu_devfreq(src: Sources) -> Path | None:
    """sysfs directory of the clock of a Jetson's graphics clusters."""
    nodes = src.entries("/sys/class/devfreq")
    return next((node for node in nodes if _GPU_CLOCKS.fullmatch(node.name)), None)


def _main_memory(src: Sources) -> tuple[int | None, int | None]:
    """Total and available main memory in bytes, within the container's limit if there is one.

    On an integrated GPU vLLM takes what is available, page cache included, for free GPU memory.
    """
    total, available = src.memory or (None, None)
    limit = src.read_int("/sys/fs/cgroup/memory.max")  # "max", no limit, is not an integer
    if total is None or available is None or limit is None or limit >= total:
        return total, available
    used = src.read_int("/sys/fs/cgroup/memory.current") or 0
    return limit, min(available, max(0, limit - used))


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


def _clocks(src: Sources, nvml: Nvml) -> dict[str, tuple[int, int]]:
    """Current and maximum MHz of each clock that is reported."""
    calls = ("nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo")
    mhz: dict[str, list[int | None]] = {
        name: [nvml.device(call, kind) for call in calls]
        for name, kind in {"gpu": CLOCK_GRAPHICS, "memory": CLOCK_MEMORY}.items()
    }
    kilo = [src.read_int(f"{_CPUFREQ}/{file}") for file in ("scaling_cur_freq", "cpuinfo_max_freq")]
    mhz["cpu"] = [None if value is None else round(value / 1e3) for value in kilo]
    if (node := gpu_devfreq(src)) is not None:
        hertz = [src.read_int(node / file) for file in ("cur_freq", "max_freq")]
        mhz["gpu"] = [None if value is None else round(value / 1e6) for value in hertz]
    return {
        name: (now, top) for name, (now, top) in mhz.items() if now is not None and top is not None
    }


def _gpu(src: Sources, nvml: Nvml, board: tuple[str, str] | None) -> dict[str, Any]:
    """Fields of the GPU that this process can use; empty if it has none."""
    present = src.visible_gpu() is not None and any(src.exists(file) for file in _JETSON_GPUS)
    if nvml.handle is None and not (board and present):  # Jetsons work without NVML
        return {}
    model, compatible = board or ("NVIDIA GPU", "")
    name = nvml.device("nvmlDeviceGetName") or model
    spec = find_spec(name, f"{model} {compatible}")
    capability = nvml.device("nvmlDeviceGetCudaComputeCapability")
    memory = nvml.device("nvmlDeviceGetMemoryInfo")
    fields = {
        "kind": "cuda",
        "name": name,
        "compute_capability": next((cc for soc, cc in _SOCS.items() if soc in compatible), None),
        # GPUs on shared memory report no memory of their own.
        "integrated": board is not None or memory is None,
        "driver": nvml.get("nvmlSystemGetDriverVersion"),
        **_published(spec),
    }
    if capability is not None:
        fields["compute_capability"] = "{}.{}".format(*capability)
    if not fields["integrated"] and memory is not None:
        fields |= {"memory_total_bytes": memory.total, "memory_available_bytes": memory.free}
    if (cuda := nvml.get("nvmlSystemGetCudaDriverVersion_v2")) is not None:
        fields["cuda"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
    if (milliwatts := nvml.device("nvmlDeviceGetEnforcedPowerLimit")) is not None:
        fields["power_limit_w"] = milliwatts / 1000
    return fields


def _published(spec: Spec | None) -> dict[str, Any]:
    if spec is None:
        return {}
    return {
        "compute_capability": spec.capability,
        "integrated": spec.integrated,
        "memory_bandwidth_bytes_s": spec.bandwidth_gb_s * 1e9,
        "bandwidth_source": spec.source,
    }
