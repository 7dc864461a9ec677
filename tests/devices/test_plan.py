"""A plan's figures follow from bytes, bandwidth and FLOP; it explains and refuses nothing."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from molmo_edge.cli.app import app
from molmo_edge.devices.detect import DeviceInfo, detect, known_device
from molmo_edge.devices.plan import Plan, PrecisionPlan, plan
from molmo_edge.devices.shapes import model_shape
from molmo_edge.devices.tensors import KNOWN
from molmo_edge.errors import ConfigError
from tests.devices.recorded import MACHINES, machine

MOLMO = model_shape("allenai/Molmo-7B-D-0924")


def rows(made: Plan) -> dict[str, PrecisionPlan]:
    return {row.precision: row for row in made.rows}


def test_decode_ceiling_is_bandwidth_over_bytes() -> None:
    for row in plan(MOLMO, known_device("thor"), prompt_tokens=1000, output_tokens=200).rows:
        moved = MOLMO.decode_bytes(row.precision) + 1100 * 28_672
        assert row.decode_tps == pytest.approx(273e9 / moved)
        batch = MOLMO.decode_bytes(row.precision) + 8 * 1100 * 28_672
        assert row.decode_tps_batch == pytest.approx(8 * 273e9 / batch)


def test_ceilings_of_the_readme() -> None:
    thor = rows(plan(MOLMO, known_device("thor")))
    card = rows(plan(MOLMO, known_device("rtx5080")))
    assert thor["bf16"].decode_tps == pytest.approx(19.25, abs=0.05)
    assert [round(thor[p].decode_tps or 0) for p in ("fp8", "w4a16", "nvfp4")] == [36, 61, 57]
    assert [round(card[p].decode_tps or 0) for p in ("fp8", "w4a16", "nvfp4")] == [125, 214, 200]
    molmo2 = model_shape("allenai/Molmo2-4B")
    for device, speeds in (("thor", [33.5, 60.5, 99.3, 93.5]), ("rtx5080", [118, 213, 349, 329])):
        made = plan(molmo2, known_device(device)).rows
        assert [row.decode_tps for row in made] == pytest.approx(speeds, abs=0.5)


def test_requests_that_fit_beside_the_weights() -> None:
    card = known_device("rtx5080")
    left = int(16 * 2**30 * 0.9) - 2**30 - MOLMO.weight_bytes("fp8")
    for dtype, token in (("fp8", 28_672), ("auto", 57_344)):
        fp8 = rows(plan(MOLMO, card, prompt_tokens=900, output_tokens=100, kv_cache_dtype=dtype))
        assert fp8["fp8"].requests == left // (1008 * token)  # blocks of 16
        assert fp8["fp8"].fits
    # On shared memory the profile sizes the cache.
    thor = plan(MOLMO, known_device("thor"))
    assert {row.requests for row in thor.rows} == {(4 << 30) // (1408 * 28_672)}


@pytest.mark.parametrize(
    ("model", "device", "longest", "frames"),
    [
        ("Molmo2-4B", "thor", 36_864, 384),
        ("Molmo2-4B", "rtx5080", 16_384, 170),
        ("Molmo2-8B", "rtx5080", 16_384, 170),
        ("Molmo2-O-7B", "thor", 16_384, 170),  # 4 GiB of cache hold no more
        ("Molmo2-O-7B", "rtx5080", 14_336, 147),  # nor does the card
    ],
)
def test_molmo_2s_longest_request_and_video(
    model: str, device: str, longest: int, frames: int
) -> None:
    shape, info = model_shape(f"allenai/{model}"), known_device(device)
    made = plan(shape, info)
    visuals, row = made.visuals, rows(made)["fp8"]
    assert visuals is not None and made.chosen == "fp8" and row.fits
    assert (
        (visuals.max_model_len, visuals.frames) == (row.max_model_len, frames) == (longest, frames)
    )
    assert visuals.seconds == (frames - 1) / 2
    needed = shape.kv_bytes(longest, "fp8") + max(visuals.encode_bytes, visuals.prefill_bytes)
    assert needed <= (made.usable_bytes or 0) - row.weight_bytes
    # 88 tokens a frame, and an answer.
    assert frames * 88 + 256 <= longest


def test_what_does_not_fit_is_explained_not_refused() -> None:
    bf16 = rows(plan(MOLMO, known_device("rtx5080")))["bf16"]
    assert (bf16.fits, bf16.requests) == (False, 0)
    assert bf16.note == "1.8 GB too large with one full-length request"
    big = plan(model_shape("allenai/Molmo-72B-0924"), known_device("orin-nano"))
    assert big.chosen is None and "do not fit" in big.chosen_reason


def test_unknown_bandwidth_gives_no_ceiling_and_says_so() -> None:
    box = plan(MOLMO, detect(machine("cpu")))
    assert {row.decode_tps for row in box.rows} == {None}
    assert any("bandwidth" in note for note in box.notes)
    measured = plan(MOLMO, detect(machine("cpu")), bandwidth_bytes_s=30e9)
    assert rows(measured)["bf16"].decode_tps == pytest.approx(30e9 / 14.2e9, rel=0.01)


def test_unknown_memory_is_unknown_not_zero() -> None:
    row = plan(MOLMO, DeviceInfo(name="NVIDIA GPU", kind="cuda")).rows[0]
    assert (row.fits, row.requests) == (None, None)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("model", KNOWN)
def test_every_machine_and_model_gives_a_plan(name: str, model: str) -> None:
    assert json.loads(json.dumps(plan(model_shape(model), detect(machine(name))).as_dict()))


@pytest.mark.parametrize(
    ("model", "device"), [("allenai/Molmo-72B-0924", "orin-nano"), ("google/gemma-3-4b-it", "h100")]
)
def test_the_command_prints_a_table_for_a_terminal(model: str, device: str) -> None:
    shown = CliRunner().invoke(app, ["plan", "--model", model, "--device", device])
    assert shown.exit_code == 0 and model in shown.output
    table = [
        line for line in shown.output.splitlines() if line.startswith(("  precision", "  fp8"))
    ]
    assert len(table) == 2 and max(map(len, table)) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_cache_dtype": "fp7"}, "unknown kv_cache_dtype 'fp7': expected auto, bfloat16, fp8"),
        ({"prompt_tokens": 0}, "must be 1 or more"),
        ({"batch": 0}, "must be 1 or more"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(MOLMO, known_device("thor"), **arguments)  # type: ignore[arg-type]
