"""The sampler measures what a machine reports, nothing else, and costs next to nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pynvml
import pytest

from molmo_edge.devices.sources import Sources
from molmo_edge.devices.telemetry import Sampler
from tests.devices.recorded import copied, machine
from tests.engine.support import eventually


def finished(sources: Sources, readings: int = 5) -> Sampler:
    """A sampler that took some readings and is closed."""
    with Sampler(0.01, sources) as sampler:
        eventually(lambda: len(sampler.readings) >= readings)
    return sampler


def test_thor_reports_the_boards_input_power() -> None:
    sampler = finished(machine("thor"))
    thor = sampler.summary()
    assert thor.power_w == pytest.approx(36.487)
    seconds = sampler.readings[-1].t_s - sampler.readings[0].t_s
    assert thor.energy_j == pytest.approx(36.487 * seconds)
    assert (thor.gpu_mhz, thor.throttled) == (315.0, None)


@pytest.mark.parametrize(
    ("file", "content", "watts"),
    [
        # No rail is the input.
        ("hwmon0/in1_label", None, 19 * 0.320 + 19 * 0.080 + 5 * 0.960 + 19 * 0.040),
        ("hwmon0/in1_label", "VDD_IN\n", 19 * 0.320),
        ("hwmon1/curr2_input", "", None),
    ],
)
def test_orin_sums_its_rails_unless_one_is_the_input_or_unknown(
    tmp_path: Path, file: str, content: str | None, watts: float | None
) -> None:
    root = copied("orin", tmp_path)
    if content is not None:
        (root / "sys/class/hwmon" / file).write_text(content)
    orin = finished(machine("orin", root)).summary()
    assert orin.power_w == pytest.approx(watts)
    assert (orin.energy_j is None) == (watts is None)


def test_unknown_is_none_never_zero(tmp_path: Path) -> None:
    nothing = finished(Sources(root=tmp_path)).summary()
    values = (nothing.power_w, nothing.energy_j, nothing.gpu_mhz, nothing.throttled)
    assert values == (None, None, None, None)


def test_a_sensor_that_fails_for_a_while_leaves_a_gap() -> None:
    sources = machine("rtx5080")
    device = sources.nvml.recording["devices"][0]
    with Sampler(60, sources) as sampler:
        del device["power_mw"]
    assert [reading.power_w for reading in sampler.readings] == [41.25, None]
    card = sampler.summary()
    assert (card.power_w, card.gpu_mhz) == (41.25, 2790)


def test_the_thread_ends_and_nvml_is_closed_also_after_an_error() -> None:
    sources = machine("rtx5080")
    with pytest.raises(RuntimeError), Sampler(60, sources) as sampler:
        assert len(sampler.readings) == 1  # before the work
        raise RuntimeError("work failed")
    assert len(sampler.readings) == 2  # and after it
    assert not [t for t in threading.enumerate() if t.name == "molmo-edge-telemetry"]
    assert sources.nvml.open == 0


@pytest.mark.parametrize(
    ("reasons", "throttled"),
    [(0, False), (pynvml.nvmlClocksEventReasonGpuIdle, False),
     (pynvml.nvmlClocksEventReasonApplicationsClocksSetting, False),
     (pynvml.nvmlClocksEventReasonSwPowerCap, True),
     (pynvml.nvmlClocksEventReasonSwThermalSlowdown, True),
     (pynvml.nvmlClocksThrottleReasonHwThermalSlowdown, True)],
)  # fmt: skip
def test_power_and_heat_throttle_and_other_reasons_do_not(reasons: int, throttled: bool) -> None:
    sources = machine("rtx5080")
    sources.nvml.recording["devices"][0]["clocks_event_reasons"] = reasons
    assert finished(sources, readings=1).summary().throttled is throttled
