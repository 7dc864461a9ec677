"""The processor and the memory of this machine, from ``/proc``, sysfs and the control group."""

from __future__ import annotations

import importlib
import re
from typing import Any

from molmo_edge.devices.sources import Sources

# What the CPU kernels ask about: flags of /proc/cpuinfo on x86, "Features" on Arm.
_X86 = (
    "avx", "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
)  # fmt: skip
_ARM = {"asimd": "neon", "asimdhp": "fp16", "bf16": "bf16", "i8mm": "i8mm", "sve": "sve",
        "sve2": "sve2", "asimddp": "dotprod", "sme": "sme"}  # fmt: skip

# (implementer, part) of Arm's main ID register, as Linux's cputype.h lists them.
_ARM_CORES = {
    (0x41, 0xD40): "Arm Neoverse-V1",
    (0x41, 0xD42): "Arm Cortex-A78AE",
    (0x41, 0xD49): "Arm Neoverse-N2",
    (0x41, 0xD4F): "Arm Neoverse-V2",
    (0x41, 0xD83): "Arm Neoverse-V3AE",
    (0x41, 0xD85): "Arm Cortex-X925",
    (0x41, 0xD87): "Arm Cortex-A725",
    (0x4E, 0x004): "NVIDIA Carmel",
}


def cpu(sources: Sources) -> tuple[str | None, frozenset[str], int | None]:
    """Name, instruction sets known to be there, and number of logical processors.

    The set is empty when nothing is known.
    """
    info = sources.read("/proc/cpuinfo") or ""
    fields: dict[str, list[str]] = {}
    for line in info.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), []).append(value.strip())
    isa: set[str] = set()
    # big.LITTLE machines list cores that differ: count on what every core has.
    flags = [set(line.split()) for line in fields.get("flags", [])]
    if flags:
        isa.update(set.intersection(*flags).intersection(_X86))
    features = [set(line.split()) for line in fields.get("features", [])]
    if features:
        isa.update(_ARM[name] for name in set.intersection(*features) if name in _ARM)
    count = len(fields.get("processor", [])) or None
    name = next(iter(fields.get("model name", [])), None) or _arm_name(fields)
    return name, frozenset(isa), count


def _arm_name(fields: dict[str, list[str]]) -> str | None:
    names: list[str] = []
    for maker, part in zip(
        fields.get("cpu implementer", []), fields.get("cpu part", []), strict=False
    ):
        try:
            name = _ARM_CORES.get((int(maker, 16), int(part, 16)))
        except ValueError:
            name = None
        if name is not None and name not in names:
            names.append(name)
    return " + ".join(names) or None


def memory(sources: Sources) -> tuple[int | None, int | None]:
    """Total and available main memory in bytes, within the container's limit if there is one.

    Available is the kernel's ``MemAvailable``, which counts reclaimable page cache: on an
    integrated GPU it is also what vLLM takes for free GPU memory.
    """
    info = sources.read("/proc/meminfo") or ""
    found = {
        key: int(kib) * 1024
        for key, kib in re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", info, re.MULTILINE)
    }
    total, available = found.get("MemTotal"), found.get("MemAvailable")
    if total is None and sources.live:
        total, available = _psutil_memory()
    limit, used = _cgroup_memory(sources)
    if limit is not None and (total is None or limit < total):
        total = limit
        if used is not None:
            left = max(0, limit - used)
            available = left if available is None else min(available, left)
    return total, available


def _psutil_memory() -> tuple[int | None, int | None]:
    try:
        psutil: Any = importlib.import_module("psutil")
        now = psutil.virtual_memory()
        return int(now.total), int(now.available)
    except Exception:
        return None, None


def _cgroup_memory(sources: Sources) -> tuple[int | None, int | None]:
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        value = sources.read_int(limit)  # "max": no limit, and not a number
        if value is not None:
            return value, sources.read_int(used)
    return None, None


def cpu_clock(sources: Sources) -> tuple[int | None, int | None] | None:
    """Current and highest clock of the first core in MHz."""
    folder = "/sys/devices/system/cpu/cpu0/cpufreq"
    current = sources.read_int(f"{folder}/scaling_cur_freq")
    maximum = sources.read_int(f"{folder}/cpuinfo_max_freq")
    if current is None and maximum is None:
        return None
    return _mhz(current, 1000), _mhz(maximum, 1000)


def cpu_governor(sources: Sources) -> str | None:
    return sources.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None


def is_wsl(sources: Sources) -> bool:
    release = sources.read("/proc/sys/kernel/osrelease") or sources.read("/proc/version") or ""
    return "microsoft" in release.lower() or "WSL_DISTRO_NAME" in sources.environ


def in_container(sources: Sources) -> bool:
    if sources.exists("/.dockerenv") or sources.exists("/run/.containerenv"):
        return True
    if sources.environ.get("container"):
        return True
    groups = sources.read("/proc/1/cgroup") or ""
    return any(word in groups for word in ("docker", "kubepods", "containerd", "lxc", "libpod"))


def _mhz(value: int | None, per_mhz: int) -> int | None:
    return None if value is None else round(value / per_mhz)
