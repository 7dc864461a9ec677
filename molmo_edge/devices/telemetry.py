"""Power, energy, clocks, temperature, memory and utilisation while something runs.

One thread reads the sensors at an interval. It needs neither root nor a service, and what the
machine does not tell is ``None``. Jetson lines of ``tegrastats`` are parsed by ``tegrastats``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from molmo_edge.devices.nvml import Nvml
from molmo_edge.devices.probes import Probes, find_probes
from molmo_edge.devices.sources import Sources, system_sources
from molmo_edge.devices.tegrastats import parse_tegrastats
from molmo_edge.errors import ConfigError

__all__ = ["Sample", "Sampler", "Summary", "parse_tegrastats"]

_KEPT = 20_000  # raw samples, over an hour at the default interval; aggregates go on for ever
_STATISTICS = ("power_w", "temperature_c", "memory_used_bytes", "utilisation", "throttled")


@dataclass(frozen=True)
class Sample:
    """One reading, ``t_s`` seconds after the start; units as in ``Probes``."""

    t_s: float
    power_w: float | None
    clocks_mhz: dict[str, float | None]
    temperature_c: float | None
    memory_used_bytes: float | None
    utilisation: float | None
    throttled: float | None


@dataclass(frozen=True)
class Stats:
    """Of all samples that gave a value."""

    mean: float
    minimum: float
    maximum: float
    count: int


@dataclass(frozen=True)
class Summary:
    """What a sampler saw; ``None`` where nothing was measured.

    Attributes:
        duration_s: from start to stop, or to now.
        samples: readings taken.
        power_w, temperature_c, memory_used_bytes, utilisation, throttled: statistics over the
            samples; the mean of `throttled` is the share of them that found the GPU slowed down.
        power_scope: what the power is of: "board input", "board rails" or "gpu".
        energy_j: joules over the duration; ``energy_method`` is "counter" (the driver's own) or
            "integrated" (power over time), ``energy_scope`` what it is of.
        clocks_mhz: statistics by name.
        cpu_share: processor time of the sampling thread over the duration, 0.01 is one percent of
            a core.
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
        """For JSON."""
        return asdict(self)


class _Running:
    """Mean, minimum and maximum of values that come one at a time."""

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0
        self.minimum, self.maximum = float("inf"), float("-inf")

    def add(self, value: float | None) -> None:
        if value is not None:
            self.count += 1
            self.total += value
            self.minimum = min(self.minimum, value)
            self.maximum = max(self.maximum, value)

    def stats(self) -> Stats | None:
        if not self.count:
            return None
        return Stats(self.total / self.count, self.minimum, self.maximum, self.count)


class Sampler:
    """Reads the sensors every ``interval_s`` seconds in one daemon thread while it is open.

    Use as a context manager; ``summary()`` works while it runs and after. It cannot be opened
    twice. A sensor that fails on the way leaves gaps, nothing more.

    Raises:
        ConfigError: an interval that is not between 0.01 and 60 s, or a second opening.
    """

    def __init__(self, interval_s: float = 0.2, sources: Sources | None = None) -> None:
        if not 0.01 <= interval_s <= 60:  # also refuses NaN
            raise ConfigError(f"interval_s must be from 0.01 to 60 seconds, not {interval_s}")
        self.interval_s = interval_s
        self._sources = sources
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._probes = Probes()
        self._samples: deque[Sample] = deque(maxlen=_KEPT)
        self._taken = 0
        self._running: dict[str, _Running] = {}
        self._joules = 0.0
        self._last_power: tuple[float, float] | None = None
        self._counter: tuple[float | None, float | None] = (None, None)
        self._started = self._ended = 0.0
        self._cpu_s: float | None = None

    def __enter__(self) -> Sampler:
        if self._thread is not None:
            raise ConfigError("a sampler cannot be opened again; make a new one")
        ready = threading.Event()
        self._started = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="molmo-edge-telemetry", daemon=True
        )
        self._thread.start()
        ready.wait(10)  # the first sample belongs before the work that is measured
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10)

    @property
    def samples(self) -> list[Sample]:
        """The latest readings, oldest first, 20,000 at most."""
        with self._lock:
            return list(self._samples)

    def _run(self, ready: threading.Event) -> None:
        sources = system_sources() if self._sources is None else self._sources
        try:
            with Nvml(sources) as nvml:
                probes = find_probes(sources, nvml)
                with self._lock:
                    self._probes = probes
                    self._started = time.monotonic()
                cpu = time.thread_time()  # finding the sensors is not sampling
                self._take(cpu)
                ready.set()
                while not self._stop.wait(self.interval_s):
                    self._take(cpu)
                self._take(cpu)
        finally:
            ready.set()
            with self._lock:
                self._ended = time.monotonic()

    def _take(self, cpu_begin: float) -> None:
        probes = self._probes
        now = time.monotonic()
        power = probes.power_w() if probes.power_w else None
        energy = probes.energy_j() if probes.energy_j else None
        sample = Sample(
            t_s=now - self._started,
            power_w=power,
            clocks_mhz={name: probe() for name, probe in probes.clocks_mhz.items()},
            temperature_c=probes.temperature_c() if probes.temperature_c else None,
            memory_used_bytes=probes.memory_used_bytes() if probes.memory_used_bytes else None,
            utilisation=probes.utilisation() if probes.utilisation else None,
            throttled=probes.throttled() if probes.throttled else None,
        )
        with self._lock:
            self._samples.append(sample)
            self._taken += 1
            for name in _STATISTICS:
                self._running.setdefault(name, _Running()).add(getattr(sample, name))
            for name, mhz in sample.clocks_mhz.items():
                self._running.setdefault(f"clock {name}", _Running()).add(mhz)
            if power is not None:
                if self._last_power is not None:
                    before, watts = self._last_power
                    self._joules += (now - before) * (watts + power) / 2
                self._last_power = (now, power)
            if energy is not None:
                first = self._counter[0]
                self._counter = (energy if first is None else first, energy)
            self._cpu_s = time.thread_time() - cpu_begin

    def summary(self) -> Summary:
        """What was measured until now, or until the sampler was closed."""
        with self._lock:
            end = self._ended or time.monotonic()
            duration = max(end - self._started, 0.0) if self._taken else 0.0
            stats = {name: running.stats() for name, running in self._running.items()}
            joules, method, scope = self._energy(stats.get("power_w"))
            prefix = "clock "
            return Summary(
                duration_s=duration,
                samples=self._taken,
                power_w=stats.get("power_w"),
                power_scope=self._probes.power_scope,
                energy_j=joules,
                energy_method=method,
                energy_scope=scope,
                clocks_mhz={
                    name.removeprefix(prefix): value
                    for name, value in stats.items()
                    if name.startswith(prefix) and value is not None
                },
                temperature_c=stats.get("temperature_c"),
                memory_used_bytes=stats.get("memory_used_bytes"),
                utilisation=stats.get("utilisation"),
                throttled=stats.get("throttled"),
                cpu_share=self._cpu_s / duration if self._cpu_s is not None and duration else None,
            )

    def _energy(self, power: Stats | None) -> tuple[float | None, str | None, str | None]:
        first, last = self._counter
        # A counter that went backwards was reset or wrapped; the power still tells.
        if first is not None and last is not None and last > first:
            return last - first, "counter", self._probes.energy_scope
        if power is not None and power.count > 1:
            return self._joules, "integrated", self._probes.power_scope
        return None, None, None
