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
               output_tokens=200, output_tps=14.0)
        for i in range(5)
    ]  # fmt: skip
    speed = {"output_tps": Summary(mean=14.0)}
    return Row(name="a", title="A", conditions={"batch": batch}, samples=samples, steady=speed)


def bandwidth(environment: Environment) -> Ceiling:
    ceiling = Ceiling()
    ceilings.add_bandwidth(ceiling, row(), environment, SHAPE)
    return ceiling


@pytest.mark.parametrize(
    ("kv", "batch", "kv_bytes"), [("fp8", 1, 28_672), ("auto", 1, 57_344), ("fp8", 4, 4 * 28_672)]
)
def test_a_step_reads_the_weights_and_the_cache(kv: str, batch: int, kv_bytes: int) -> None:
    step = ceilings.step_bytes(SHAPE, thor(kv_cache_dtype=kv), batch, 1300.0)
    assert step == SHAPE.decode_bytes("bf16") + 1300 * kv_bytes


def test_fourteen_tokens_per_second_are_most_of_thors_bandwidth() -> None:
    # 14.2 GB of blocks and head in BF16 and 37 MB of cache: 14 tok/s move 200 of 273 GB/s.
    assert bandwidth(thor()).bandwidth_share == pytest.approx(0.73, abs=0.02)
    assert bandwidth(thor()).ceiling_tps == pytest.approx(19.1, abs=0.3)


def test_what_is_not_known_has_no_ceiling() -> None:
    for unknown in (
        {"precision": None},
        {"precision": "int3"},
        {"kv_cache_dtype": "odd"},
        {"kv_cache_dtype": None},
        {"dtype": "float32"},
    ):
        assert ceilings.step_bytes(SHAPE, thor(**unknown), 1, 1300.0) is None
    assert ceilings.step_bytes(None, thor(), 1, 1300.0) is None
    assert ceilings.shape_of(object()) is None
    speculative, no_device = thor(), thor()
    speculative.other["speculation"] = "ngram"
    assert bandwidth(speculative).bytes_per_token is None
    no_device.device.bandwidth_bytes_per_s = None
    known = bandwidth(no_device)
    assert known.bytes_per_token is not None and known.bandwidth_share is None


def sampler(watts: float | None, slowed: float | None = None, offset: float = 0.0) -> Any:
    """Readings of 500 times 0.1 s: 70 W in decode, 30 W in prefill; 3,300 J in all."""
    times = [i / 10 for i in range(500)]
    known = watts is not None
    power = [(70.0 if t % 10 >= 1 else 30.0) if known else None for t in times]
    summary = SimpleNamespace(
        power_w=SimpleNamespace(mean=watts) if known else None,
        energy_j=3300.0 if known else None,
        clocks_mhz={"gpu": SimpleNamespace(mean=1500.0)},
        throttled=None if slowed is None else SimpleNamespace(maximum=slowed),
    )
    return SimpleNamespace(
        summary=lambda: summary,
        samples=[
            SimpleNamespace(t_s=t + offset, power_w=w) for t, w in zip(times, power, strict=True)
        ],
    )


@pytest.mark.parametrize(("slowed", "throttled"), [(None, None), (0.0, False), (1.0, True)])
@pytest.mark.parametrize("offset", [0.0, 2.5])
def test_watts_of_decode_leave_the_prefill_out(
    offset: float, slowed: float | None, throttled: bool | None
) -> None:
    ceiling = Ceiling()
    ceilings.add_power(ceiling, row(), sampler(66.0, slowed, offset), offset)
    assert ceiling.watts == pytest.approx(70.0, abs=0.5)
    assert ceiling.joules_per_token == pytest.approx(5.0, abs=0.05)
    assert ceiling.tps_per_watt == pytest.approx(0.2, abs=0.01)
    assert ceiling.row_joules_per_token == pytest.approx(3.3)
    assert (ceiling.gpu_mhz, ceiling.throttled) == (1500.0, throttled)


def test_no_sensor_is_unknown_and_a_batch_takes_the_whole_row() -> None:
    none, batch = Ceiling(), Ceiling()
    ceilings.add_power(none, row(), sampler(None))
    assert (none.watts, none.joules_per_token, none.tps_per_watt) == (None, None, None)
    ceilings.add_power(batch, row(batch=4), sampler(66.0))
    assert batch.watts == 66.0 and batch.joules_per_token == pytest.approx(3.3)
