"""Bytes a token, share of the bandwidth, and power, on figures that can be checked by hand."""

from __future__ import annotations

import pytest

from molmo_edge.bench import ceilings
from molmo_edge.bench.document import Ceiling, Environment, Row, Sample, Summary
from molmo_edge.devices.checkpoint import model_shape
from molmo_edge.devices.telemetry import Sample as Reading
from molmo_edge.devices.telemetry import Stats
from molmo_edge.devices.telemetry import Summary as Seen

SHAPE = model_shape("allenai/Molmo-7B-D-0924")


def thor(**model: str | None) -> Environment:
    environment = Environment()
    environment.device.bandwidth_bytes_per_s = 273e9
    environment.model.precision = "bf16"
    environment.model.kv_cache_dtype = "fp8"
    for name, value in model.items():
        setattr(environment.model, name, value)
    return environment


def row(batch: int = 1) -> Row:
    samples = [
        Sample(
            iteration=i,
            started_s=i * 10.0,
            ttft_s=1.0,
            e2e_s=10.0,
            prompt_tokens=1200,
            output_tokens=200,
            output_tps=14.0,
        )
        for i in range(5)
    ]
    speed = {"output_tps": Summary(mean=14.0)}
    return Row(
        name="a",
        title="A",
        conditions={"batch": batch},
        samples=samples,
        all=speed,
        steady=speed,
    )


def test_bytes_a_token_are_the_weights_and_the_cache() -> None:
    expected = SHAPE.decode_bytes("bf16") + 1300 * 28_672
    assert ceilings.step_bytes(SHAPE, thor(), 1, 1300.0) == expected
    assert ceilings.step_bytes(SHAPE, thor(kv_cache_dtype="auto"), 1, 1300.0) == (
        SHAPE.decode_bytes("bf16") + 1300 * 57_344
    )
    assert ceilings.step_bytes(SHAPE, thor(), 4, 1300.0) == (
        SHAPE.decode_bytes("bf16") + 4 * 1300 * 28_672
    )


def test_fourteen_tokens_a_second_are_most_of_thors_bandwidth() -> None:
    meter = ceilings.Meter(thor(), SHAPE)
    measured = row()
    meter.finish(measured)
    assert measured.ceiling is not None
    # 14.2 GB of blocks and head in BF16 and 37 MB of cache: 14 tok/s move 200 of 273 GB/s.
    assert measured.ceiling.bandwidth_share == pytest.approx(0.73, abs=0.02)
    assert measured.ceiling.ceiling_tps == pytest.approx(19.1, abs=0.3)


@pytest.mark.parametrize(
    "unknown",
    [
        {"precision": None},
        {"precision": "int3"},
        {"kv_cache_dtype": "odd"},
        {"kv_cache_dtype": None},
        {"dtype": "float32"},
    ],
)
def test_a_layout_that_is_not_known_has_no_ceiling(unknown: dict[str, str | None]) -> None:
    assert ceilings.step_bytes(SHAPE, thor(**unknown), 1, 1300.0) is None
    assert ceilings.step_bytes(None, thor(), 1, 1300.0) is None
    assert ceilings.step_bytes(SHAPE, thor(), 1, None) is None


def test_speculation_has_no_ceiling_by_the_token() -> None:
    environment = thor()
    environment.other["speculation"] = "ngram"
    assert ceilings.step_bytes(SHAPE, environment, 1, 1300.0) is None


def test_without_a_bandwidth_the_share_is_unknown() -> None:
    environment = thor()
    environment.device.bandwidth_bytes_per_s = None
    measured = row()
    ceilings.Meter(environment, SHAPE).finish(measured)
    assert measured.ceiling is not None
    assert measured.ceiling.bytes_per_token is not None
    assert measured.ceiling.bandwidth_share is None


def seen(watts: float | None, joules: float | None, slowed: float | None = None) -> Seen:
    return Seen(
        duration_s=50.0,
        samples=500,
        power_w=None if watts is None else Stats(watts, watts, watts, 500),
        power_scope="board input",
        energy_j=joules,
        energy_method="integrated",
        energy_scope="board input",
        clocks_mhz={"gpu": Stats(1500.0, 1400.0, 1575.0, 500)},
        temperature_c=None,
        memory_used_bytes=None,
        utilisation=None,
        throttled=None if slowed is None else Stats(slowed / 2, 0.0, slowed, 500),
        cpu_share=None,
    )


def readings(offset: float) -> list[Reading]:
    out = []
    for i in range(500):
        t = i / 10
        decoding = t % 10 >= 1.0
        out.append(Reading(t + offset, 70.0 if decoding else 30.0, {}, None, None, None, None))
    return out


@pytest.mark.parametrize(("slowed", "throttled"), [(None, None), (0.0, False), (1.0, True)])
def test_a_row_in_which_the_clocks_were_held_down_says_so(
    slowed: float | None, throttled: bool | None
) -> None:
    ceiling = Ceiling()
    ceilings.power(ceiling, row(), seen(66.0, 3300.0, slowed), readings(0.0))
    assert ceiling.throttled is throttled


@pytest.mark.parametrize("offset", [0.0, 2.5])
def test_watts_of_decode_leave_the_prefill_out(offset: float) -> None:
    ceiling = Ceiling()
    ceilings.power(ceiling, row(), seen(66.0, 3300.0), readings(offset), offset)
    assert ceiling.watts == pytest.approx(70.0, abs=0.5)
    assert ceiling.joules_per_token == pytest.approx(5.0, abs=0.05)
    assert ceiling.tps_per_watt == pytest.approx(0.2, abs=0.01)
    assert ceiling.row_joules_per_token == pytest.approx(3.3)
    assert ceiling.gpu_mhz == 1500.0


def test_no_sensor_is_unknown_and_a_batch_takes_the_whole_row() -> None:
    none = Ceiling()
    ceilings.power(none, row(), seen(None, None), [])
    assert (none.watts, none.joules_per_token, none.tps_per_watt) == (None, None, None)
    batch = Ceiling()
    ceilings.power(batch, row(batch=4), seen(66.0, 3300.0), readings(0.0))
    assert batch.watts == 66.0
    assert batch.joules_per_token == pytest.approx(3.3)


def test_an_engine_without_settings_has_no_shape() -> None:
    assert ceilings.shape_of(object()) is None


def test_a_meter_leaves_no_thread_behind() -> None:
    import threading

    before = threading.active_count()
    meter = ceilings.Meter(thor(), SHAPE, interval_s=0.05)
    meter.start()
    meter.finish(row())
    assert threading.active_count() == before
