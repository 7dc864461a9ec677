"""Bytes per token, fraction of the bandwidth, and power, on figures that can be checked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from molmo_edge.bench import ceilings
from molmo_edge.bench.document import Ceiling, Environment, Row, Sample, Summary
from molmo_edge.devices.shapes import model_shape

SHAPE = model_shape("allenai/Molmo-7B-D-0924")


def thor(**model: str | None) -> Environment:
    environment = Environment()
    environment.device.bandwidth_bytes_per_s = 273e9
    for name, value in {"precision": "bf16", "kv_cache_dtype": "fp8", **model}.items():
        setattr(environment.model, name, value)
    return environment


def row(batch: int = 1) -> Row:
    samples = [
        Sample(iteration=i, started_s=i * 10.0, ttft_s=1.0, e2e_s=10.0, prompt_tokens=1200,
               output_tokens=200)
        for i in range(5)
    ]  # fmt: skip
    speed = {"output_tps": Summary(mean=14.0)}
    return Row(name="a", title="A", conditions={"batch": batch}, samples=samples, steady=speed)


@pytest.mark.parametrize(
    ("kv", "batch", "kv_bytes"), [("fp8", 1, 28_672), ("auto", 1, 57_344), ("fp8", 4, 4 * 28_672)]
)
def test_a_step_reads_the_weights_and_the_cache(kv: str, batch: int, kv_bytes: int) -> None:
    step = ceilings.step_bytes(SHAPE, thor(kv_cache_dtype=kv), batch, 1300.0)
    assert step == SHAPE.decode_bytes("bf16") + 1300 * kv_bytes


def test_fourteen_tokens_per_second_are_most_of_thors_bandwidth() -> None:
    # 14.2 GB of blocks and head in BF16 and 37 MB of cache: 14 tok/s move 200 of 273 GB/s.
    ceiling = Ceiling()
    ceilings.add_bandwidth(ceiling, row(), thor(), SHAPE)
    assert ceiling.bandwidth_share == pytest.approx(0.73, abs=0.02)
    assert ceiling.ceiling_tps == pytest.approx(19.1, abs=0.3)


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
def test_what_is_not_known_has_no_ceiling(unknown: dict[str, str | None]) -> None:
    assert ceilings.step_bytes(SHAPE, thor(**unknown), 1, 1300.0) is None
    speculative = thor()
    speculative.other["speculation"] = "ngram"
    assert ceilings.step_bytes(SHAPE, speculative, 1, 1300.0) is None


def sampler(watts: float | None, slowed: bool | None = None) -> Any:
    """Readings of 500 times 0.1 s: 70 W in decode, 30 W in prefill; 3,300 J in all."""
    known = watts is not None
    readings = [
        SimpleNamespace(t_s=i / 10, power_w=(70.0 if i % 100 >= 10 else 30.0) if known else None)
        for i in range(500)
    ]
    summary = SimpleNamespace(
        power_w=watts,
        energy_j=3300.0 if known else None,
        gpu_mhz=1500.0,
        throttled=slowed,
    )
    return SimpleNamespace(summary=lambda: summary, readings=readings)


def power(batch: int, readings: Any) -> Ceiling:
    ceiling = Ceiling()
    ceilings.add_power(ceiling, row(batch), readings)
    return ceiling


@pytest.mark.parametrize("slowed", [None, False, True])
def test_watts_of_decode_leave_the_prefill_out(slowed: bool | None) -> None:
    ceiling = power(1, sampler(66.0, slowed))
    assert ceiling.watts == pytest.approx(70.0, abs=0.5)
    assert ceiling.joules_per_token == pytest.approx(5.0, abs=0.05)
    assert ceiling.tps_per_watt == pytest.approx(0.2, abs=0.01)
    assert ceiling.row_joules_per_token == pytest.approx(3.3)
    assert (ceiling.gpu_mhz, ceiling.throttled) == (1500.0, slowed)


def test_no_sensor_is_unknown_and_a_batch_takes_the_whole_row() -> None:
    none, batch = power(1, sampler(None)), power(4, sampler(66.0))
    assert (none.watts, none.joules_per_token, none.tps_per_watt) == (None, None, None)
    assert batch.watts == 66.0 and batch.joules_per_token == pytest.approx(3.3)
