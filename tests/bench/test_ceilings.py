"""Bytes per token, fraction of the bandwidth, and power, on figures that can be checked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from molmo_edge.bench import ceilings
from molmo_edge.bench.document import Ceiling, Environment, Row, Sample, Summary
from molmo_edge.devices.shapes import model_shape
from molmo_edge.devices.telemetry import TelemetrySummary

SHAPE = model_shape("allenai/Molmo-7B-D-0924")


def thor(**model: str | None) -> Environment:
    environment = Environment()
    environment.device.memory_bandwidth_bytes_s = 273e9
    for name, value in {"precision": "bf16", "kv_cache_dtype": "fp8", **model}.items():
        setattr(environment.model, name, value)
    return environment


def ceiling(condition: str = "batch", **measured: Any) -> Ceiling:
    """Of five answers of 200 tokens at 14 tok/s."""
    samples = [Sample(iteration=i, prompt_tokens=1200, output_tokens=200) for i in range(5)]
    row = Row(name="a", title="A", conditions={condition: 1}, samples=samples)
    row.steady = {"output_tps": Summary(mean=14.0)}
    known = {"power_w": None, "energy_j": None, "gpu_mhz": None, "throttled": None, **measured}
    return ceilings.of(row, thor(), SHAPE, TelemetrySummary(**known))


@pytest.mark.parametrize(
    ("kv", "batch", "kv_bytes"), [("fp8", 1, 28_672), ("auto", 1, 57_344), ("fp8", 4, 4 * 28_672)]
)
def test_a_step_reads_the_weights_and_the_cache(kv: str, batch: int, kv_bytes: int) -> None:
    step = ceilings.step_bytes(SHAPE, thor(kv_cache_dtype=kv), batch, 1300.0)
    assert step == SHAPE.decode_bytes("bf16") + 1300 * kv_bytes


def test_fourteen_tokens_per_second_are_most_of_thors_bandwidth() -> None:
    # 14.2 GB of blocks and head in BF16 and 37 MB of cache: 14 tok/s move 200 of 273 GB/s.
    assert ceiling().bandwidth_share == pytest.approx(0.73, abs=0.02)
    assert ceiling("fps").bandwidth_share == ceiling().bandwidth_share
    assert ceiling("users").bandwidth_share is None


def test_power_is_of_the_row_and_unknown_without_a_sensor() -> None:
    known = ceiling(power_w=66.0, energy_j=3300.0, gpu_mhz=1500.0, throttled=False)
    assert (known.watts, known.gpu_mhz, known.throttled) == (66.0, 1500.0, False)
    assert known.joules_per_token == pytest.approx(3.3)
    assert (ceiling().watts, ceiling().joules_per_token, ceiling().throttled) == (None, None, None)


@pytest.mark.parametrize(
    "unknown",
    [{"precision": None}, {"precision": "int3"}, {"kv_cache_dtype": "odd"}, {"dtype": "float32"}],
)
def test_what_is_not_known_has_no_ceiling(unknown: dict[str, str | None]) -> None:
    assert ceilings.step_bytes(SHAPE, thor(**unknown), 1, 1300.0) is None
