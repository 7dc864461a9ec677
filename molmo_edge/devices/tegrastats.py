"""One line of NVIDIA's ``tegrastats`` as values. It knows the format, not how to run the tool."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = r"\d+(?:\.\d+)?"
_STAMP = re.compile(r"^(\d\d-\d\d-\d{4} \d\d:\d\d:\d\d)")
_RAM = re.compile(r"\bRAM (\d+)/(\d+)([kMG])B")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_CORE = re.compile(rf"({_NUMBER})%@(\d+)")
_EMC = re.compile(rf"\bEMC_FREQ (?:({_NUMBER})%)?(?:@(\d+))?")
_GPU = re.compile(rf"\bGR3D_FREQ (?:({_NUMBER})%)?(?:@\[?([\d,]*)\]?)?")
_TEMPERATURE = re.compile(rf"(?<![\w@])([A-Za-z][\w-]*)@(-?{_NUMBER})C\b")
_POWER = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)mW(?:/(\d+)mW)?")
_UNIT = {"k": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_tegrastats(line: str) -> dict[str, Any]:
    """The values of one line; ``None`` for what is not in it, never 0.

    Returns:
        ``time`` (str), ``ram_used_bytes``, ``ram_total_bytes``, ``cpu`` (a list with
        (utilisation in percent, MHz) for each core, ``None`` for one that is off),
        ``gpu_utilisation`` and ``emc_utilisation`` in percent, ``gpu_mhz`` (a list, one for each
        cluster), ``emc_mhz``, ``temperature_c`` (sensor to degrees) and ``power_w`` (rail to
        watts now). A board that is too cold or absent reports -256 °C, which is unknown.
    """
    ram, emc, gpu = _RAM.search(line), _EMC.search(line), _GPU.search(line)
    stamp = _STAMP.search(line)
    unit = _UNIT[ram[3]] if ram else 0
    clocks = [int(mhz) for mhz in (gpu[2] or "").split(",") if mhz] if gpu else []
    celsius = {name: float(value) for name, value in _TEMPERATURE.findall(line)}
    return {
        "time": stamp[1] if stamp else None,
        "ram_used_bytes": int(ram[1]) * unit if ram else None,
        "ram_total_bytes": int(ram[2]) * unit if ram else None,
        "cpu": _cores(line),
        "gpu_utilisation": _float(gpu[1]) if gpu else None,
        "gpu_mhz": clocks or None,
        "emc_utilisation": _float(emc[1]) if emc else None,
        "emc_mhz": int(emc[2]) if emc and emc[2] else None,
        "temperature_c": {name: t for name, t in celsius.items() if t > -200} or None,
        "power_w": {name: int(now) / 1000 for name, now, _ in _POWER.findall(line)} or None,
    }


def _cores(line: str) -> list[tuple[float, int] | None] | None:
    found = _CPU.search(line)
    if found is None:
        return None
    cores = [_CORE.fullmatch(core.strip()) for core in found[1].split(",")]
    return [None if core is None else (float(core[1]), int(core[2])) for core in cores]


def _float(text: str | None) -> float | None:
    return None if text is None else float(text)
