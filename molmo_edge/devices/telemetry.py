"""Measure power, energy, clocks, temperature, memory and utilisation during a run.

One thread reads the sensors at an interval. It needs neither root nor a service, and what the
machine does not report is ``None``.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from molmo_edge.devices.detect import gpu_devfreq, jetson, main_memory
from molmo_edge.devices.nvml import CLOCK_GRAPHICS, CLOCK_MEMORY, TEMPERATURE_GPU, Nvml
from molmo_edge.devices.sources import Sources, system_sources
from molmo_edge.errors import ConfigError

Probe = Callable[[], float | None]

_KEPT = 20_000  # readings, over an hour at the default interval; statistics cover all of them
_VALUES = ("power_w", "temperature_c", "memory_used_bytes", "utilisation", "throttled")
_CLOCK = "clock "
# Rails that carry everything the board draws; AGX Orin has none, and its rails are summed.
_INPUT_RAILS = ("VDD_IN", "VIN", "POM_5V_IN")


@dataclass(frozen=True)
class Reading:
    """Values of all sensors ``t_s`` seconds after the start; units as in ``TelemetrySummary``."""

    t_s: float
    power_w: float | None
    clocks_mhz: dict[str, float | None]
    temperature_c: float | None
    memory_used_bytes: float | None
    utilisation: float | None
    throttled: float | None


@dataclass(frozen=True)
class Stats:
    """Statistics of the readings that have a value."""

    mean: float
    minimum: float
    maximum: float
    count: int

    def add(self, value: float) -> Stats:
        count = self.count + 1
        mean = self.mean + (value - self.mean) / count
        return Stats(mean, min(self.minimum, value), max(self.maximum, value), count)


@dataclass(frozen=True)
class TelemetrySummary:
    """Statistics of all readings of a sampler; ``None`` where nothing was measured.

    Attributes:
        duration_s: from start to stop, or until now.
        samples: number of readings.
        power_w: watts of ``power_scope``: "board input", "board rails" or "gpu".
        energy_j: joules over the duration; ``energy_method`` is "counter" (the driver's own) or
            "integrated" (power over time); ``energy_scope`` as for the power, or "cpu package".
        clocks_mhz: by name ("gpu", "memory", "cpu").
        temperature_c: of the GPU, or of the hottest part of a processor.
        memory_used_bytes: of GPU memory, or of main memory where the GPU is integrated.
        utilisation: of the GPU, 0 to 1.
        throttled: 1 while power or heat holds the GPU's clocks down, else 0.
        cpu_share: processor time of sampling over the duration; 0.01 is one percent of a core.
    """

    duration_s: float
    samples: int
    power_w: Stats | None
    power_scope: str | None
    energy_j: float | None
    energy_method: str | None
    energy_scope: str | None
    clocks_mhz: dict[str, Stats]
    temperature_c: Stats | None
    memory_used_bytes: Stats | None
    utilisation: Stats | None
    throttled: Stats | None
    cpu_share: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class Sampler:
    """Reads the sensors every ``interval_s`` seconds in a daemon thread, as a context manager.

    ``summary()`` works while it runs and afterwards. A sensor that fails for a while leaves gaps.

    Raises:
        ConfigError: an interval that is not between 0.01 and 60 s, or a second ``__enter__``.
    """

    def __init__(self, interval_s: float = 0.2, sources: Sources | None = None) -> None:
        if not 0.01 <= interval_s <= 60:  # also refuses NaN
            raise ConfigError(f"interval_s must be from 0.01 to 60 seconds, not {interval_s}")
        self.interval_s = interval_s
        self._sources = system_sources() if sources is None else sources
        self._lock = threading.Lock()
        self._running = threading.Lock()  # held until stopped
        self._thread: threading.Thread | None = None
        self._sensors = Sensors({}, None, None)
        self._readings: deque[Reading] = deque(maxlen=_KEPT)
        self._count = 0
        self._stats: dict[str, Stats] = {}
        self._joules = self._cpu_s = 0.0
        self._power: tuple[float, float] | None = None  # of the last reading, and when
        self._counter: tuple[float, float] | None = None  # joules of the first and last reading
        self._started = self._ended = 0.0

    def __enter__(self) -> Sampler:
        if self._thread is not None:
            raise ConfigError("a sampler cannot be started again; create a new one")
        nvml = Nvml(self._sources).__enter__()
        self._sensors = find_sensors(self._sources, nvml)
        self._running.acquire()
        self._thread = threading.Thread(
            target=self._run, args=(nvml,), name="molmo-edge-telemetry", daemon=True
        )
        self._started = time.monotonic()
        self._read()  # the first reading belongs before the work that is measured
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._thread is not None and self._running.locked():
            self._running.release()
            self._thread.join(10)

    @property
    def samples(self) -> list[Reading]:
        """The latest readings, oldest first, at most 20,000."""
        with self._lock:
            return list(self._readings)

    def summary(self) -> TelemetrySummary:
        """Statistics until now, or until the sampler stopped."""
        with self._lock:
            stats = dict(self._stats)
            duration = (self._ended or time.monotonic()) - self._started if self._count else 0.0
            energy = self._energy()
            return TelemetrySummary(
                duration_s=duration,
                samples=self._count,
                power_scope=self._sensors.power_scope,
                energy_j=energy[0],
                energy_method=energy[1],
                energy_scope=energy[2],
                clocks_mhz={
                    name.removeprefix(_CLOCK): value
                    for name, value in stats.items()
                    if name.startswith(_CLOCK)
                },
                cpu_share=self._cpu_s / duration if duration else None,
                **{name: stats.get(name) for name in _VALUES},
            )

    def _run(self, nvml: Nvml) -> None:
        try:
            while not self._running.acquire(timeout=self.interval_s):
                self._read()
            self._read()
        finally:
            nvml.__exit__()
            with self._lock:
                self._ended = time.monotonic()

    def _read(self) -> None:
        cpu, now = time.thread_time(), time.monotonic()
        values = {name: probe() for name, probe in self._sensors.probes.items()}
        clocks = {n.removeprefix(_CLOCK): v for n, v in values.items() if n.startswith(_CLOCK)}
        fields = {name: values.get(name) for name in _VALUES}
        with self._lock:
            self._readings.append(Reading(now - self._started, clocks_mhz=clocks, **fields))
            self._count += 1
            for name, value in values.items():
                if value is not None:
                    known = self._stats.get(name)
                    self._stats[name] = known.add(value) if known else Stats(value, value, value, 1)
            if (power := values.get("power_w")) is not None:
                if self._power is not None:
                    before, watts = self._power
                    self._joules += (now - before) * (watts + power) / 2
                self._power = (now, power)
            if (energy := values.get("energy_j")) is not None:
                self._counter = (self._counter[0] if self._counter else energy, energy)
            self._cpu_s += time.thread_time() - cpu

    def _energy(self) -> tuple[float | None, str | None, str | None]:
        # A counter that went backwards was reset or has wrapped.
        if self._counter is not None and self._counter[1] > self._counter[0]:
            return self._counter[1] - self._counter[0], "counter", self._sensors.energy_scope
        power = self._stats.get("power_w")
        if power is not None and power.count > 1:
            return self._joules, "integrated", self._sensors.power_scope
        return None, None, None


@dataclass(frozen=True)
class Sensors:
    """Functions that read one sensor each and never raise; what a machine lacks has none."""

    probes: Mapping[str, Probe]
    power_scope: str | None
    energy_scope: str | None


def find_sensors(src: Sources, nvml: Nvml) -> Sensors:
    """Find the sensors that answer now, so that a reading costs a few small files.

    ``nvml`` must stay open while they are used.
    """
    on_jetson = jetson(src) is not None
    node = gpu_devfreq(src) if on_jetson else None
    cpu_clock = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    options: dict[str, list[Probe]] = {
        f"{_CLOCK}gpu": [partial(_nvml, nvml, 1, "nvmlDeviceGetClockInfo", CLOCK_GRAPHICS)],
        f"{_CLOCK}memory": [partial(_nvml, nvml, 1, "nvmlDeviceGetClockInfo", CLOCK_MEMORY)],
        f"{_CLOCK}cpu": [partial(_file, src, 1e-3, cpu_clock)],
        "temperature_c": [
            partial(_nvml, nvml, 1, "nvmlDeviceGetTemperature", TEMPERATURE_GPU),
            *(partial(_file, src, 1e-3, file) for file in _thermal_files(src, on_jetson)),
        ],
        "memory_used_bytes": [partial(_gpu_memory, nvml), partial(_main_memory, src)],
        "utilisation": [partial(_utilisation, nvml)],
        "throttled": [nvml.throttled],
    }
    if node is not None:
        options[f"{_CLOCK}gpu"].insert(0, partial(_file, src, 1e-6, node / "cur_freq"))
        options["utilisation"].append(partial(_file, src, 1e-3, node / "device" / "load"))
    rails = _rails(src)
    whole = [files for name, files in rails if name in _INPUT_RAILS]
    # The board's input comes first: NVML on a Jetson reports a part, and not with every driver.
    power: dict[str, Probe] = {
        "board input": partial(_watts, src, whole[:1]),
        "board rails": partial(_watts, src, [files for _, files in rails]),
        "gpu": partial(_nvml, nvml, 1e-3, "nvmlDeviceGetPowerUsage"),
    }
    power_scope = next((scope for scope, probe in power.items() if probe() is not None), None)
    energy_scope = None
    if power_scope == "gpu":
        energy_scope = "gpu"
        counter = "nvmlDeviceGetTotalEnergyConsumption"
        options["energy_j"] = [partial(_nvml, nvml, 1e-3, counter)]
    elif power_scope is None and nvml.handle is None:
        energy_scope = "cpu package"
        rapl = "/sys/class/powercap/intel-rapl:0/energy_uj"
        options["energy_j"] = [partial(_file, src, 1e-6, rapl)]
    probes = {
        name: next((probe for probe in choices if probe() is not None), None)
        for name, choices in options.items()
    }
    if power_scope is not None:
        probes["power_w"] = power[power_scope]
    return Sensors({n: p for n, p in probes.items() if p is not None}, power_scope, energy_scope)


def _rails(src: Sources) -> list[tuple[str, tuple[Path, ...]]]:
    """Power rails of the board's INA3221 and INA238 monitors: name, files whose product is µW."""
    rails: list[tuple[str, tuple[Path, ...]]] = []
    for chip in src.entries("/sys/class/hwmon"):
        kind = src.read(chip / "name")
        if kind == "ina238":  # measures the board's input
            rails.append(("VIN", (chip / "power1_input",)))
        for channel in (1, 2, 3) if kind == "ina3221" else ():
            name = src.read(chip / f"in{channel}_label")
            if name and name != "NC" and "sum of" not in name.lower():
                rails.append((name, (chip / f"in{channel}_input", chip / f"curr{channel}_input")))
    return rails


def _thermal_files(src: Sources, on_jetson: bool) -> list[Path]:
    types = ("tj-thermal", "gpu-thermal") if on_jetson else ("x86_pkg_temp", "cpu-thermal")
    zones: dict[str | None, Path] = {}
    for zone in src.entries("/sys/class/thermal"):
        if re.fullmatch(r"thermal_zone\d+", zone.name):
            zones.setdefault(src.read(zone / "type"), zone)
    return [zones[kind] / "temp" for kind in types if kind in zones]


def _watts(src: Sources, rails: list[tuple[Path, ...]]) -> float | None:
    """Sum over the rails; unknown if one of them is."""
    total = 0.0
    for files in rails:
        values = [value for file in files if (value := src.read_int(file)) is not None]
        if len(values) < len(files):
            return None
        total += math.prod(values) * 1e-6
    return total if rails else None


def _file(src: Sources, scale: float, path: str | Path) -> float | None:
    value = src.read_int(path)
    return None if value is None else value * scale


def _nvml(nvml: Nvml, scale: float, function: str, *args: int) -> float | None:
    value = nvml.number(function, *args)
    return None if value is None else value * scale


def _gpu_memory(nvml: Nvml) -> float | None:
    memory = nvml.device("nvmlDeviceGetMemoryInfo")
    used, total = getattr(memory, "used", None), getattr(memory, "total", None)
    return used if isinstance(used, int) and isinstance(total, int) and total else None


def _main_memory(src: Sources) -> float | None:
    total, available = main_memory(src)
    return None if total is None or available is None else total - available


def _utilisation(nvml: Nvml) -> float | None:
    percent = getattr(nvml.device("nvmlDeviceGetUtilizationRates"), "gpu", None)
    return percent / 100 if isinstance(percent, int) else None
