"""The sampler measures what a machine tells, nothing else, and costs next to nothing."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest

from molmo_edge.devices.nvml import Nvml
from molmo_edge.devices.sources import Sources, system_sources
from molmo_edge.devices.telemetry import Sampler, TelemetrySummary, find_sensors
from molmo_edge.errors import ConfigError
from tests.devices.recorded import MACHINES, copied, machine
from tests.engine.support import eventually


def wait_for(sampler: Sampler, samples: int) -> None:
    """Until so many were taken since the opening: sleeping promises none on a busy machine."""
    eventually(lambda: sampler.summary().samples >= samples)


def finished(sources: Sources, interval_s: float = 0.01) -> Sampler:
    """A sampler that took some samples and is closed."""
    with Sampler(interval_s, sources) as sampler:
        wait_for(sampler, 5)
    return sampler


def sampled(sources: Sources) -> TelemetrySummary:
    return finished(sources).summary()


def integrated(watts: float, sampler: Sampler) -> float:
    """Joules of a constant power between the first sample and the last."""
    return watts * (sampler.samples[-1].t_s - sampler.samples[0].t_s)


def test_thor_reports_the_boards_input_power() -> None:
    sampler = finished(machine("thor"))
    thor = sampler.summary()
    assert thor.power_scope == "board input"
    assert thor.power_w is not None and thor.power_w.mean == pytest.approx(36.487)
    assert thor.energy_method == "integrated"
    assert thor.energy_j == pytest.approx(integrated(36.487, sampler))
    assert thor.duration_s >= sampler.samples[-1].t_s
    assert {name: stats.mean for name, stats in thor.clocks_mhz.items()} == {
        "gpu": 315.0, "cpu": 972.0,
    }  # fmt: skip
    assert thor.temperature_c is not None and thor.temperature_c.maximum == 49.625
    assert thor.memory_used_bytes is not None
    assert thor.memory_used_bytes.mean == (128766976 - 120213504) * 1024
    assert thor.utilisation is not None and thor.utilisation.mean == 0.0  # NVML says 0: known


def test_orin_sums_its_rails_because_no_rail_is_the_input() -> None:
    orin = sampled(machine("orin"))
    assert orin.power_scope == "board rails"
    watts = 19 * 0.320 + 19 * 0.080 + 5 * 0.960 + 19 * 0.040
    assert orin.power_w is not None and orin.power_w.mean == pytest.approx(watts)
    assert orin.utilisation is not None and orin.utilisation.mean == pytest.approx(0.345)


def test_one_missing_rail_makes_the_sum_unknown(tmp_path: Path) -> None:
    root = copied("orin", tmp_path)
    (root / "sys/class/hwmon/hwmon1/curr2_input").write_text("")
    orin = sampled(machine("orin", root))
    assert (orin.power_w, orin.energy_j, orin.power_scope) == (None, None, None)


def test_a_rail_of_the_whole_input_is_preferred(tmp_path: Path) -> None:
    root = copied("orin", tmp_path)
    (root / "sys/class/hwmon/hwmon0/in1_label").write_text("VDD_IN\n")
    orin = sampled(machine("orin", root))
    assert orin.power_scope == "board input"
    assert orin.power_w is not None and orin.power_w.mean == pytest.approx(19 * 0.320)


def test_discrete_card_counts_energy_with_the_drivers_counter() -> None:
    sources = machine("rtx5080")
    device = sources.nvml.recording["devices"][0]
    with Sampler(0.01, sources) as sampler:
        assert sampler.summary().energy_method in (None, "integrated")  # the counter stands still
        device["energy_mj"] += 2500
        sources.nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: device["energy_mj"]
        wait_for(sampler, 3)
    card = sampler.summary()
    assert card.energy_j == pytest.approx(2.5)
    assert (card.energy_method, card.energy_scope) == ("counter", "gpu")
    assert card.power_w is not None and card.power_w.mean == 41.25
    assert card.clocks_mhz["memory"].maximum == 15001


def test_a_counter_that_goes_backwards_is_not_believed() -> None:
    sources = machine("rtx5080")
    counts = iter([5_000_000, 5_000_000, *[10] * 10_000])
    sources.nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(counts)
    sampler = finished(sources)
    card = sampler.summary()
    assert card.energy_method == "integrated"
    assert card.energy_j == pytest.approx(integrated(41.25, sampler))


def test_readable_rapl_counts_a_processors_energy(tmp_path: Path) -> None:
    root = copied("cpu", tmp_path)
    counter = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    counter.parent.mkdir(parents=True)
    counter.write_text("1000000")
    with Sampler(0.01, machine("cpu", root)) as sampler:
        counter.write_text("4000000")
    summary = sampler.summary()
    assert summary.energy_j == pytest.approx(3.0)
    assert summary.energy_scope == "cpu package"
    assert summary.power_w is None


def test_unknown_is_none_never_zero(tmp_path: Path) -> None:
    nothing = sampled(Sources(root=tmp_path))
    assert (nothing.power_w, nothing.energy_j, nothing.temperature_c) == (None, None, None)
    assert (nothing.memory_used_bytes, nothing.utilisation, nothing.clocks_mhz) == (None, None, {})
    assert nothing.samples >= 2


def test_a_sensor_that_fails_on_the_way_leaves_a_gap() -> None:
    sources = machine("rtx5080")
    calls = iter(range(10_000))

    def flaky(_handle: Any) -> int:
        if next(calls) % 2:
            raise OSError("gone")
        return 40_000

    sources.nvml.nvmlDeviceGetPowerUsage = flaky
    sampler = finished(sources)
    summary = sampler.summary()
    assert summary.power_w is not None
    assert 0 < summary.power_w.count < summary.samples
    assert summary.power_w.minimum == 40.0
    assert None in {sample.power_w for sample in sampler.samples}


def test_samples_come_before_and_after_the_work() -> None:
    with Sampler(10, machine("thor")) as sampler:
        assert len(sampler.samples) == 1
    assert len(sampler.samples) == 2
    assert sampler.samples[0].t_s < sampler.samples[1].t_s


def test_summary_works_while_running_and_holds_still_after() -> None:
    with Sampler(0.01, machine("thor")) as sampler:
        first = sampler.summary()
        wait_for(sampler, first.samples + 1)
        second = sampler.summary()
    last = sampler.summary()
    assert first.samples < second.samples <= last.samples
    assert sampler.summary() == last


def test_the_thread_ends_and_nvml_is_closed() -> None:
    sources = machine("rtx5080")
    sampled(sources)
    assert not [t for t in threading.enumerate() if t.name == "molmo-edge-telemetry"]
    assert sources.nvml.open == 0


def test_the_thread_ends_after_an_error_in_the_body() -> None:
    with pytest.raises(RuntimeError), Sampler(0.01, machine("thor")):
        raise RuntimeError("work failed")
    assert not [t for t in threading.enumerate() if t.name == "molmo-edge-telemetry"]


@pytest.mark.parametrize("interval", [0, -1, 0.001, 61, float("nan"), float("inf")])
def test_an_interval_out_of_range_is_refused(interval: float) -> None:
    with pytest.raises(ConfigError, match=r"interval_s must be from 0\.01 to 60"):
        Sampler(interval)


def test_a_sampler_is_opened_once() -> None:
    with Sampler(1, machine("cpu")) as sampler:
        pass
    with pytest.raises(ConfigError, match="cannot be started again"):
        sampler.__enter__()


@pytest.mark.parametrize("name", MACHINES)
def test_summary_is_json_on_every_machine(name: str) -> None:
    plain = sampled(machine(name)).as_dict()
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize("name", MACHINES)
def test_a_sample_reads_each_sensor_once_and_looks_for_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one costs: at most 16 small files of some 20 µs each, five times a second."""
    reads: list[str] = []
    looked: list[Any] = []
    read = Sources.read

    def counted(self: Sources, path: str | Path) -> str | None:
        reads.append(str(path))
        return read(self, path)

    sources = machine(name)
    run = sources.run
    with Sampler(10, replace(sources, run=lambda c: looked.append(c) or run(c))) as sampler:
        looked.clear()  # the first sample is there; closing takes the second
        monkeypatch.setattr(Sources, "read", counted)
        monkeypatch.setattr(Sources, "entries", lambda self, path: looked.append(path) or [])
    assert len(sampler.samples) == 2
    assert looked == []
    assert len(reads) <= 16
    assert len(reads) == len(set(reads))


def test_this_machine_can_be_sampled() -> None:
    summary = sampled(system_sources())
    assert summary.memory_used_bytes is not None and summary.memory_used_bytes.mean > 0
    assert summary.cpu_share is not None and summary.cpu_share > 0


def test_probes_are_chosen_once() -> None:
    """A sensor that answers only later is not picked up, so that columns stay the same."""
    sources = machine("cpu")
    with Nvml(sources) as nvml:
        probes = find_sensors(sources, nvml).probes
    assert set(probes) == {"clock cpu", "temperature_c", "memory_used_bytes"}
    assert probes["temperature_c"]() == 51.0


@pytest.mark.parametrize("name", ["clocks_event_reasons", "clocks_throttle_reasons"])
@pytest.mark.parametrize(
    ("reasons", "throttled"),
    [(0, 0.0), (pynvml.nvmlClocksEventReasonGpuIdle, 0.0),
     (pynvml.nvmlClocksEventReasonApplicationsClocksSetting, 0.0),
     (pynvml.nvmlClocksEventReasonSwPowerCap, 1.0),
     (pynvml.nvmlClocksEventReasonSwThermalSlowdown, 1.0),
     (pynvml.nvmlClocksThrottleReasonHwSlowdown, 1.0),
     (pynvml.nvmlClocksThrottleReasonHwThermalSlowdown, 1.0),
     (pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown, 1.0)],
)  # fmt: skip
def test_power_and_heat_throttle_and_other_reasons_do_not(
    name: str, reasons: int, throttled: float
) -> None:
    source = machine("rtx5080")
    source.nvml.recording["devices"][0][name] = reasons
    found = sampled(source).throttled
    assert found is not None and (found.mean, found.maximum) == (throttled, throttled)


def test_without_the_drivers_word_throttling_is_unknown() -> None:
    assert sampled(machine("thor")).throttled is None
