"""Measure power, energy, GPU clock and throttling during a run.

One thread reads the sensors at an interval. It needs neither root nor a service, and what the
machine does not report is ``None``.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.devices.detect import gpu_devfreq
from molmo_edge.devices.sources import CLOCK_GRAPHICS, Nvml, Sources, system_sources

# Rails that carry everything the board draws; AGX Orin has none, and its rails are summed.
_INPUT_RAILS = ("VDD_IN", "VIN", "POM_5V_IN")


@dataclass(frozen=True)
class Reading:
    """Values of the sensors at one time."""

    t_s: float  # since the start
    power_w: float | None  # of the board on a Jetson, of the GPU elsewhere
    gpu_mhz: float | None
    throttled: bool | None  # whether power or heat holds the GPU's clocks down


@dataclass(frozen=True)
class TelemetrySummary:
    """Means over all readings; ``None`` where nothing was measured."""

    power_w: float | None
    energy_j: float | None  # mean power times the time from first to last reading
    gpu_mhz: float | None
    throttled: bool | None  # whether any reading was


class Sampler:
    """Reads the sensors every ``interval_s`` seconds in a daemon thread, as a context manager.

    ``readings`` grow while it runs; the first is taken before the work, the last after it.
    """

    def __init__(self, interval_s: float = 0.2, sources: Sources | None = None) -> None:
        self.interval_s = interval_s
        self.readings: list[Reading] = []
        self._sources = system_sources() if sources is None else sources
        self._nvml = Nvml(self._sources)
        self._rails = _rails(self._sources)
        self._clock = gpu_devfreq(self._sources)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="molmo-edge-telemetry", daemon=True)
        self._started = 0.0

    def __enter__(self) -> Sampler:
        self._nvml.__enter__()
        self._started = time.monotonic()
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()
        self._nvml.__exit__()

    def summary(self) -> TelemetrySummary:
        """Summarise the readings until now."""
        readings = self.readings.copy()
        throttled = [r.throttled for r in readings if r.throttled is not None]
        power_w = _mean(reading.power_w for reading in readings)
        energy_j = None
        if power_w is not None and len(readings) > 1:
            energy_j = power_w * (readings[-1].t_s - readings[0].t_s)
        return TelemetrySummary(
            power_w=power_w,
            energy_j=energy_j,
            gpu_mhz=_mean(reading.gpu_mhz for reading in readings),
            throttled=any(throttled) if throttled else None,
        )

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            self._read()

    def _read(self) -> None:
        nvml = self._nvml
        if self._rails:  # on a Jetson NVML reports a part, and not with every driver
            power = _watts(self._sources, self._rails)
        else:
            power = _scaled(nvml.device("nvmlDeviceGetPowerUsage"), 1e-3)
        if self._clock is not None:
            clock = _scaled(self._sources.read_int(self._clock / "cur_freq"), 1e-6)
        else:
            clock = _scaled(nvml.device("nvmlDeviceGetClockInfo", CLOCK_GRAPHICS), 1)
        t_s = time.monotonic() - self._started
        self.readings.append(Reading(t_s, power, clock, nvml.throttled()))


def _rails(src: Sources) -> list[tuple[Path, ...]]:
    """Files of each power rail to sum, whose product is µW, of INA3221 and INA238 monitors."""
    rails: dict[str, tuple[Path, ...]] = {}
    for chip in src.entries("/sys/class/hwmon"):
        kind = src.read(chip / "name")
        if kind == "ina238":  # measures the board's input
            rails["VIN"] = (chip / "power1_input",)
        for channel in (1, 2, 3) if kind == "ina3221" else ():
            name = src.read(chip / f"in{channel}_label")
            if name and name != "NC" and "sum of" not in name.lower():
                rails[name] = (chip / f"in{channel}_input", chip / f"curr{channel}_input")
    whole = [rails[name] for name in _INPUT_RAILS if name in rails]
    return whole[:1] or list(rails.values())


def _watts(src: Sources, rails: list[tuple[Path, ...]]) -> float | None:
    """Sum over the rails; unknown if one of them is."""
    total = 0.0
    for files in rails:
        values = [value for file in files if (value := src.read_int(file)) is not None]
        if len(values) < len(files):
            return None
        total += math.prod(values) * 1e-6
    return total


def _scaled(value: int | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
