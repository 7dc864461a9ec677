"""A quantised checkpoint is whole or not there, means what it says, and runs in the real engine."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from molmo_edge import EdgeVLM, quant_formats, quant_plan, quantize
from molmo_edge.errors import ModelError, QuantizeError
from molmo_edge.molmo.synthetic import Shape, write_checkpoint
from molmo_edge.quant_formats import FORMATS, format_of, pack, unpack
from molmo_edge.verify import QUESTION, _reference, picture

# Relative error of round-to-nearest on normal weights, with some room.
TYPICAL = {"fp8": 0.03, "w4a16": 0.11, "nvfp4": 0.095}
SCHEMES = tuple(FORMATS)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def layer_of(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    """Stored parts of one layer, the bias left out."""
    start = layer + "."
    return {
        name.removeprefix(start): value
        for name, value in tensors.items()
        if name.startswith(start) and not name.endswith(".bias")
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32 whose tower has one block; no engine loads it."""
    folder = tmp_path_factory.mktemp("original") / "small"
    shape = Shape(vit_blocks=1)
    return write_checkpoint(folder, seed=3, shape=shape, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Output files of a few tensors each."""
    monkeypatch.setattr(quant_plan, "SHARD_BYTES", 1 << 20)
    yield


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_unpacked_is_near_the_original(scheme: str) -> None:
    form = format_of(scheme)
    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    packed = pack(weight, form)
    error = float((unpack(packed.tensors, form) - weight).norm() / weight.norm())
    assert error == pytest.approx(packed.relative_error, rel=1e-3)
    assert error < TYPICAL[scheme]
    assert sum(t.nbytes for t in packed.tensors.values()) <= form.stored_bytes(weight.shape)


@pytest.mark.parametrize("scheme", ["fp8", "w4a16"])
def test_packing_twice_changes_nothing(scheme: str) -> None:
    form = format_of(scheme)
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(2))
    # Levels from -8 to 7 in every group, as quantised weights have them.
    levels = (weight * 3).round().clamp(-8, 7)
    levels[:, ::128] = -8
    once = levels * 0.125 if scheme == "w4a16" else unpack(pack(weight, form).tensors, form)
    assert pack(once, form).relative_error < 1e-6


@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4"])
def test_searched_scales_beat_covering_ones(scheme: str) -> None:
    form = format_of(scheme)
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    plain = pack(weight, dataclasses.replace(form, search=(1.0,))).relative_error
    assert pack(weight, form).relative_error < 0.95 * plain


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_packed_alike_in_one_piece_and_in_many(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = format_of(scheme)
    weight = torch.randn(100, 256, generator=torch.Generator().manual_seed(5))
    whole = pack(weight, form).tensors
    monkeypatch.setattr(quant_formats, "_VALUES", 16 * 256)
    parts = pack(weight, form).tensors
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), parts[name].view(torch.uint8)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_and_outliers_survive(scheme: str) -> None:
    form = format_of(scheme)
    weight = torch.zeros(32, 256)
    assert not unpack(pack(weight, form).tensors, form).any()
    weight[3, 7] = 1000.0
    back = unpack(pack(weight, form).tensors, form)
    assert float(back[3, 7]) == pytest.approx(1000.0, rel=0.05)
    weight[3, 7] = 0
    back[3, 7] = 0
    assert torch.equal(back, weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_language_models_linear_layers_are_packed(
    scheme: str, small: Path, tmp_path: Path
) -> None:
    done = quantize.quantize(small, tmp_path / "out", scheme)
    names = {f"model.transformer.blocks.{i}." for i in range(2)}
    layers = ("att_proj", "attn_out", "ff_proj", "ff_out")
    assert set(done.relative_errors) == {name + layer for name in names for layer in layers}
    assert all(0 < error < TYPICAL[scheme] for error in done.relative_errors.values())
    before, after = tensors_of(small), tensors_of(done.folder)
    packed = {f"{layer}.weight" for layer in done.relative_errors}
    for name, tensor in before.items():
        if name not in packed:
            assert torch.equal(after[name], tensor.to(torch.bfloat16)), name
    for layer in done.relative_errors:
        stored = unpack(layer_of(after, layer), format_of(scheme))
        weight = before[layer + ".weight"]
        error = float((stored - weight).norm() / weight.norm())
        assert error == pytest.approx(done.relative_errors[layer], rel=1e-3)


def test_the_config_says_what_vllm_must_know(small: Path, tmp_path: Path) -> None:
    folder = quantize.quantize(small, tmp_path / "out", "w4a16").folder
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert r"re:^model\.transformer\.ff_out$" in config["ignore"]
    assert "re:.*vision_backbone.*" in config["ignore"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 128, True)


def test_the_card_names_the_scheme_and_every_layers_error(small: Path, tmp_path: Path) -> None:
    done = quantize.quantize(small, tmp_path / "out", "fp8")
    card = (done.folder / "README.md").read_text()
    assert "# small, fp8" in card
    for layer, error in done.relative_errors.items():
        assert f"| `{layer}` | {error:.4f} |" in card


def test_the_index_names_every_tensor_and_data_files_come_along(
    small: Path, tmp_path: Path, shards: None
) -> None:
    (small / "modeling_molmo.py").write_text("raise SystemExit")
    folder = quantize.quantize(small, tmp_path / "out", "w4a16").folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    for file in set(index.values()):
        with safe_open(folder / file, framework="pt") as opened:
            assert set(opened.keys()) == {n for n, f in index.items() if f == file}
    assert (folder / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    assert not list(folder.glob("*.py"))
    assert {path.name for path in folder.parent.iterdir()} == {"out"}


def test_progress_ends_at_the_whole(small: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    done = quantize.quantize(
        small, tmp_path / "out", "fp8", progress=lambda *args: told.append(args)
    )
    counts = [count for count, _, _ in told]
    assert counts == sorted(counts)
    assert told[-1][:2] == (done.in_bytes, done.in_bytes)
    assert len(told) == len(tensors_of(small))


class Killed(BaseException):
    """Ends a run as Ctrl-C does."""


def test_an_interrupted_run_goes_on_from_its_finished_files(
    small: Path, tmp_path: Path, shards: None
) -> None:
    whole = quantize.quantize(small, tmp_path / "whole", "w4a16")
    half = whole.in_bytes // 2

    def stop(done: int, total: int, name: str) -> None:
        if done > half:
            raise Killed

    with pytest.raises(Killed):
        quantize.quantize(small, tmp_path / "out", "w4a16", progress=stop)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    again = quantize.quantize(small, tmp_path / "out", "w4a16")
    assert again.resumed_files > 0
    assert again.relative_errors == whole.relative_errors
    for path in sorted(whole.folder.iterdir()):
        assert (again.folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert {p.name for p in again.folder.iterdir()} == {p.name for p in whole.folder.iterdir()}
    assert not (tmp_path / "out.partial").exists()


def test_an_interrupted_run_of_another_scheme_is_started_anew(
    small: Path, tmp_path: Path, shards: None
) -> None:
    def stop(done: int, total: int, name: str) -> None:
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        quantize.quantize(small, tmp_path / "out", "fp8", progress=stop)
    done = quantize.quantize(small, tmp_path / "out", "w4a16")
    assert done.resumed_files == 0
    assert not any(name.endswith("ff_out.weight") and "blocks" in name
                   for name in tensors_of(done.folder))  # fmt: skip


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("other")])
def test_a_failure_leaves_nothing(
    small: Path, tmp_path: Path, shards: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save, calls = quantize._save, []

    def fail(path: Path, tensors: dict[str, Any]) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise error
        save(path, tensors)

    monkeypatch.setattr(quantize, "_save", fail)
    expected = QuantizeError if isinstance(error, OSError) else ValueError
    with pytest.raises(expected):
        quantize.quantize(small, tmp_path / "out", "fp8")
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_told_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(QuantizeError, match=r"needs 0\.1 GB"):
        quantize.quantize(small, tmp_path / "out", "fp8")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheme_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="fp8, w4a16, nvfp4"):
        quantize.quantize(small, tmp_path / "out", "int3")


def test_an_existing_output_is_left_alone(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(QuantizeError, match="exists already"):
        quantize.quantize(small, out, "fp8")
    assert (out / "kept").exists()


def test_a_strangers_folder_in_the_way_is_left_alone(small: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "kept").touch()
    with pytest.raises(QuantizeError, match="in the way"):
        quantize.quantize(small, tmp_path / "out", "fp8")
    assert (work / "kept").exists()


def test_a_quantised_checkpoint_is_refused(small: Path, tmp_path: Path) -> None:
    once = quantize.quantize(small, tmp_path / "once", "fp8").folder
    with pytest.raises(QuantizeError, match="quantised already"):
        quantize.quantize(once, tmp_path / "twice", "w4a16")


def damaged(small: Path, folder: Path, change: Any) -> Path:
    """A copy of the checkpoint with other tensors."""
    shutil.copytree(small, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


LAYER = "model.transformer.blocks.1.ff_out.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(LAYER), "lacks 1 tensors, first 'model.transformer.blocks.1.ff_out"),
        (lambda t: t.pop("model.vision_backbone.pad_embed"), "pad_embed"),
        (lambda t: t.update({LAYER: t[LAYER][:, :256].clone()}), "config.json asks for"),
        (lambda t: t.update({LAYER: t[LAYER].to(torch.int8)}), "stored as I8"),
        (lambda t: t[LAYER].fill_(float("nan")), "no finite numbers"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_tensor(
    small: Path, tmp_path: Path, change: Any, said: str
) -> None:
    folder = damaged(small, tmp_path / "damaged", change)
    with pytest.raises(QuantizeError, match=said):
        quantize.quantize(folder, tmp_path / "out", "w4a16")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_columns_that_fill_no_group_are_refused() -> None:
    with pytest.raises(QuantizeError, match="multiple of the 128"):
        format_of("w4a16").check("x.weight", (64, 200))


def test_what_is_no_checkpoint_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        quantize.quantize(tmp_path, tmp_path / "out", "fp8")


def dequantised(folder: Path, out: Path, scheme: str) -> Path:
    """The checkpoint as plain float32, by compressed-tensors' own code."""
    tensors = tensors_of(folder)
    for layer in [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]:
        parts = layer_of(tensors, layer)
        for suffix in parts:
            del tensors[f"{layer}.{suffix}"]
        tensors[f"{layer}.weight"] = unpack(parts, format_of(scheme))
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    for path in folder.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            shutil.copy(path, out)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scheme", ["w4a16", "fp8"])
def test_the_real_engine_runs_it_as_the_dequantised_yardstick(
    scheme: str, tmp_path: Path
) -> None:
    """Through vLLM's own kernels, which compute in bfloat16 (and fp8 rounds activations too)."""
    # Measured: 0.03 for w4a16; 0.10 for fp8, whose activations have three bits of mantissa.
    kernels = {"w4a16": 0.1, "fp8": 0.2}[scheme]
    torch.set_num_threads(2)
    original = write_checkpoint(tmp_path / "original", seed=3)
    quantised = quantize.quantize(original, tmp_path / "out", scheme).folder
    plain = dequantised(quantised, tmp_path / "plain", scheme)
    pictures = {"small": picture(90, 120, 0), "text only": None}
    meant = _reference(plain, pictures, 8)
    whole = _reference(original, pictures, 8)
    with EdgeVLM(
        quantised, dtype="bfloat16", max_model_len=1024, max_num_seqs=1, kv_cache_memory_gb=0.1
    ) as vlm:
        for name, image in pictures.items():
            for expected, bound in ((meant[name], kernels), (whole[name], 0.75)):
                found = vlm.score(image, QUESTION, expected.token_ids).logprobs
                pairs = zip(found, expected.logprobs, strict=True)
                assert max(abs(a - b) for a, b in pairs) < bound
