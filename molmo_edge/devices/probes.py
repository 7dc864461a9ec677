"""The sensors of a machine as callables, chosen once so that a sample costs a few reads.

A probe returns a number or ``None``; it never raises. What a machine lacks has no probe.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from molmo_edge.devices import host
from molmo_edge.devices import jetson as tegra
from molmo_edge.devices.nvml import CLOCK_GRAPHICS, CLOCK_MEMORY, TEMPERATURE_GPU, Nvml
from molmo_edge.devices.sources import Sources

Probe = Callable[[], float | None]

# Rails that carry everything the board draws; on AGX Orin there is none, and rails are summed.
_INPUT_RAILS = ("VDD_IN", "VIN", "POM_5V_IN")


@dataclass(frozen=True)
class Probes:
    """What can be measured here.

    Attributes:
        power_w: watts now; ``power_scope`` says of what: "board input", "board rails", "gpu".
        energy_j: joules since the driver started or the counter last wrapped, of
            ``energy_scope``: that of the power, or "cpu package" where there is no power.
        clocks_mhz: name ("gpu", "memory", "cpu") to MHz.
        temperature_c: of the GPU, or of the hottest part of a processor.
        memory_used_bytes: of GPU memory, or of main memory where the two are one.
        utilisation: of the GPU, 0 to 1.
        throttled: 1 while power or heat holds the GPU's clocks down, else 0.
    """

    power_w: Probe | None = None
    power_scope: str | None = None
    energy_j: Probe | None = None
    energy_scope: str | None = None
    clocks_mhz: dict[str, Probe] = field(default_factory=dict)
    temperature_c: Probe | None = None
    memory_used_bytes: Probe | None = None
    utilisation: Probe | None = None
    throttled: Probe | None = None


def find_probes(src: Sources, nvml: Nvml) -> Probes:
    """Every sensor that answers now. ``nvml`` must stay open while the probes are used."""
    board = tegra.jetson(src)
    power, scope = _power(src, nvml)
    energy, energy_scope = _energy(src, nvml, scope)
    clocks: dict[str, Probe] = {
        "gpu": _nvml(nvml, "nvmlDeviceGetClockInfo", CLOCK_GRAPHICS),
        "memory": _nvml(nvml, "nvmlDeviceGetClockInfo", CLOCK_MEMORY),
    }
    node = tegra.gpu_devfreq(src) if board is not None else None
    if node is not None:
        clocks["gpu"] = _file(src, node / "cur_freq", 1e-6)
    cpu = src.path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    clocks["cpu"] = _file(src, cpu, 1e-3)
    temperature = _first(
        _nvml(nvml, "nvmlDeviceGetTemperature", TEMPERATURE_GPU), *_thermal(src, board is not None)
    )
    load = None if node is None else _file(src, node / "device" / "load", 1e-3)
    utilisation = _first(_nvml_utilisation(nvml), *([] if load is None else [load]))
    return Probes(
        power_w=power,
        power_scope=scope,
        energy_j=energy,
        energy_scope=energy_scope,
        clocks_mhz={name: probe for name, probe in clocks.items() if probe() is not None},
        temperature_c=temperature,
        memory_used_bytes=_first(_nvml_memory(nvml), _host_memory(src)),
        utilisation=utilisation,
        throttled=_first(nvml.slowed),
    )


def _power(src: Sources, nvml: Nvml) -> tuple[Probe | None, str | None]:
    rails = tegra.rails(src)
    # A board's whole input comes first: NVML on a Jetson gives a part, and not with every driver.
    whole = [rail for rail in rails if rail.chip == "ina238" or rail.name in _INPUT_RAILS]
    for chosen, scope in ((whole[:1], "board input"), (rails, "board rails")):

        def watts(chosen: list[tegra.Rail] = chosen) -> float | None:
            values = [rail.watts(src) for rail in chosen]
            known = [value for value in values if value is not None]
            return sum(known) if known and len(known) == len(values) else None

        if watts() is not None:
            return watts, scope
    gpu = _nvml(nvml, "nvmlDeviceGetPowerUsage", scale=1e-3)
    return (gpu, "gpu") if gpu() is not None else (None, None)


def _energy(src: Sources, nvml: Nvml, scope: str | None) -> tuple[Probe | None, str | None]:
    if scope == "gpu":
        counter = _nvml(nvml, "nvmlDeviceGetTotalEnergyConsumption", scale=1e-3)
        return (counter, "gpu") if counter() is not None else (None, None)
    if scope is None and nvml.handle is None:
        package = _file(src, src.path("/sys/class/powercap/intel-rapl:0/energy_uj"), 1e-6)
        return (package, "cpu package") if package() is not None else (None, None)
    return None, None


def _thermal(src: Sources, is_jetson: bool) -> list[Probe]:
    wanted = ("tj-thermal", "gpu-thermal") if is_jetson else ("x86_pkg_temp", "cpu-thermal")
    zones: dict[str, Path] = {}
    for zone in src.entries("/sys/class/thermal"):
        if re.fullmatch(r"thermal_zone\d+", zone.name):
            zones.setdefault(src.read(zone / "type") or "", zone)
    return [_file(src, zones[name] / "temp", 1e-3) for name in wanted if name in zones]


def _first(*probes: Probe) -> Probe | None:
    return next((probe for probe in probes if probe() is not None), None)


def _file(src: Sources, path: Path, scale: float) -> Probe:
    def read() -> float | None:
        value = src.read_int(path)
        return None if value is None else value * scale

    return read


def _nvml(nvml: Nvml, function: str, *args: int, scale: float = 1.0) -> Probe:
    def read() -> float | None:
        value = nvml.number(function, *args)
        return None if value is None else value * scale

    return read


def _nvml_memory(nvml: Nvml) -> Probe:
    def read() -> float | None:
        info = nvml.device("nvmlDeviceGetMemoryInfo")
        total, used = getattr(info, "total", None), getattr(info, "used", None)
        return float(used) if isinstance(used, int) and isinstance(total, int) and total else None

    return read


def _nvml_utilisation(nvml: Nvml) -> Probe:
    def read() -> float | None:
        percent = getattr(nvml.device("nvmlDeviceGetUtilizationRates"), "gpu", None)
        return percent / 100 if isinstance(percent, int) else None

    return read


def _host_memory(src: Sources) -> Probe:
    def read() -> float | None:
        total, available = host.memory(src)
        return None if total is None or available is None else float(total - available)

    return read
