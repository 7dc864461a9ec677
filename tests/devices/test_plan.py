"""A plan's figures follow from bytes, bandwidth and FLOP; it explains and refuses nothing."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from molmo_edge.cli.plan_table import plan_table
from molmo_edge.devices.detect import detect, known_device
from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.plan import Plan, PrecisionPlan, plan
from molmo_edge.devices.shapes import model_shape
from molmo_edge.devices.tensors import KNOWN
from molmo_edge.errors import ConfigError
from tests.devices.recorded import MACHINES, machine

MOLMO = model_shape("allenai/Molmo-7B-D-0924")


def rows(found: Plan) -> dict[str, PrecisionPlan]:
    return {row.precision: row for row in found.rows}


def printed(found: Plan) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as capture:
        console.print(plan_table(found))
    return capture.get()


def test_decode_ceiling_is_bandwidth_over_bytes() -> None:
    found = plan(MOLMO, known_device("thor"), prompt_tokens=1000, output_tokens=200)
    for row in found.rows:
        moved = MOLMO.decode_bytes(row.precision) + 1100 * 28_672
        assert row.decode_tps == pytest.approx(273e9 / moved)
        assert row.limit == "bandwidth"
        batch = MOLMO.decode_bytes(row.precision) + 8 * 1100 * 28_672
        assert row.decode_tps_batch == pytest.approx(8 * 273e9 / batch)


def test_ceilings_of_the_two_machines_of_the_report() -> None:
    thor = rows(plan(MOLMO, known_device("thor")))
    card = rows(plan(MOLMO, known_device("rtx5080")))
    assert thor["bf16"].decode_tps == pytest.approx(19.25, abs=0.05)
    assert [round(thor[p].decode_tps or 0) for p in ("fp8", "w4a16", "nvfp4")] == [36, 61, 57]
    assert [round(card[p].decode_tps or 0) for p in ("fp8", "w4a16", "nvfp4")] == [125, 214, 200]


def test_prefill_ceiling_uses_the_arithmetic_of_the_precision() -> None:
    thor = rows(plan(MOLMO, known_device("thor")))
    bf16 = thor["bf16"].prefill_tps
    assert bf16 is not None
    assert thor["fp8"].prefill_tps == pytest.approx(2 * bf16)
    assert thor["nvfp4"].prefill_tps == pytest.approx(4 * bf16)
    assert thor["w4a16"].prefill_tps == bf16  # unpacked to BF16 before multiplying
    orin = rows(plan(MOLMO, known_device("orin")))
    assert orin["fp8"].prefill_tps == orin["bf16"].prefill_tps
    assert "weights only" in orin["fp8"].note


def test_a_short_prompt_still_reads_all_weights() -> None:
    one = rows(plan(MOLMO, known_device("thor"), prompt_tokens=1))["bf16"].prefill_tps
    assert one == pytest.approx(273e9 / MOLMO.weights("bf16").blocks)


def test_a_large_batch_is_bound_by_arithmetic() -> None:
    shape = replace(MOLMO, kv_heads=1)
    row = rows(plan(shape, known_device("rtx3090"), batch=4096, kv_cache_dtype="fp8"))["w4a16"]
    per_token = shape.flops_per_token(1305) + 2 * shape.head
    assert row.decode_tps_batch == pytest.approx(71e12 / per_token)


def test_requests_that_fit_by_length_and_cache_dtype() -> None:
    card = rows(plan(MOLMO, known_device("rtx5080"), lengths=(1000, 4096)))
    fp8 = card["fp8"]
    budget = int(16 * 2**30 * 0.9) - 2**30 - MOLMO.weights("fp8").total
    assert fp8.kv_budget_bytes == budget
    assert fp8.requests[4096]["fp8"] == budget // (4096 * 28_672)
    assert fp8.requests[1000]["bfloat16"] == budget // (1008 * 57_344)  # blocks of 16
    assert fp8.fits is True


def test_what_does_not_fit_is_explained_not_refused() -> None:
    bf16 = rows(plan(MOLMO, known_device("rtx5080")))["bf16"]
    assert (bf16.fits, bf16.kv_budget_bytes, bf16.requests[4096]["fp8"]) == (False, 0, 0)
    assert bf16.note == "weights are 1.7 GB too large"
    big = plan(model_shape("allenai/Molmo-72B-0924"), known_device("orin-nano"))
    assert big.chosen is None and "do not fit" in big.chosen_reason
    assert "nothing fits" in printed(big)


def test_profile_bounds_the_cache_on_shared_memory() -> None:
    thor = plan(MOLMO, known_device("thor"))
    assert {row.kv_budget_bytes for row in thor.rows} == {4 << 30}
    assert thor.kv_cache_dtype == "fp8"
    assert plan(MOLMO, known_device("orin")).kv_cache_dtype == "bfloat16"


def test_unknown_bandwidth_gives_no_ceiling_and_says_so() -> None:
    box = plan(MOLMO, detect(machine("cpu")))
    assert {row.decode_tps for row in box.rows} == {None}
    assert any("bandwidth" in note for note in box.notes)
    measured = plan(MOLMO, detect(machine("cpu")), bandwidth_bytes_s=30e9)
    assert rows(measured)["bf16"].decode_tps == pytest.approx(30e9 / 14.2e9, rel=0.01)
    assert rows(measured)["bf16"].prefill_tps is None


def test_unknown_memory_is_unknown_not_zero() -> None:
    row = plan(MOLMO, DeviceInfo(name="NVIDIA GPU", kind="cuda")).rows[0]
    assert (row.fits, row.kv_budget_bytes, row.requests[4096]["fp8"]) == (None, None, None)
    assert "?" in printed(plan(MOLMO, DeviceInfo(name="NVIDIA GPU", kind="cuda")))


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("model", KNOWN)
def test_every_machine_and_model_gives_a_plan(name: str, model: str) -> None:
    found = plan(model_shape(model), detect(machine(name)))
    assert json.loads(json.dumps(found.as_dict())) is not None
    assert found.as_dict()["rows"][0]["weights"]["total"] == found.rows[0].weights.total
    text = printed(found)
    assert model.split("/")[1] in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_cache_dtype": "fp7"}, "unknown kv_cache_dtype 'fp7': expected auto, bfloat16, fp8"),
        ({"prompt_tokens": 0}, "must be 1 or more"),
        ({"batch": 0}, "must be 1 or more"),
        ({"lengths": (0,)}, "must be 1 or more"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(MOLMO, known_device("thor"), **arguments)  # type: ignore[arg-type]
