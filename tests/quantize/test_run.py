"""Quantised checkpoints are complete or absent and contain what vLLM needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from molmo_edge.devices.shapes import matrix_bytes, model_shape
from molmo_edge.devices.tensors import Tower
from molmo_edge.errors import ModelError, QuantizeError
from molmo_edge.models.molmo.synthetic import hub_config, write_checkpoint
from molmo_edge.models.molmo2 import synthetic as molmo2
from molmo_edge.quantize import quantize
from molmo_edge.quantize.formats import HEADS
from tests.quantize.support import plain_tensors, tensors_of

# Relative error of round-to-nearest on normal weights, with some room.
TYPICAL = {"fp8": 0.03, "w4a16": 0.11, "nvfp4": 0.095}
TOWER = Tower(width=64, mlp=64, blocks=1, pooled=64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32 with a small tower, which no engine loads."""
    directory = tmp_path_factory.mktemp("original") / "small"
    return write_checkpoint(directory, seed=3, tower=TOWER, dtype=torch.float32)


@pytest.fixture(scope="module", params=["molmo", "molmo2 4b", "molmo2 o-7b"])
def family(request: pytest.FixtureRequest, small: Path) -> tuple[Path, tuple[str, ...]]:
    """A checkpoint, and the linear layers of a block."""
    if request.param == "molmo":
        return small, ("att_proj", "attn_out", "ff_proj", "ff_out")
    layout: molmo2.Layout = request.param.split()[1]
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
    directory = small.with_name(f"molmo2-{layout}")
    molmo2.write_checkpoint(directory, molmo2.hub_config(layout, text=sizes), seed=3)
    return directory, (
        "self_attn.att_proj", "self_attn.attn_out", "mlp.ff_proj", "mlp.ff_out"
    )  # fmt: skip


@pytest.mark.parametrize("scheme", TYPICAL)
def test_only_the_language_models_linear_layers_are_quantised(
    scheme: str, family: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    small, layers = family
    calls: list[tuple[int, int, str]] = []
    done = quantize(
        small, tmp_path / "out", scheme, head="none", progress=lambda *call: calls.append(call)
    )
    blocks = {f"model.transformer.blocks.{i}." for i in range(2)}
    assert set(done.relative_errors) == {block + layer for block in blocks for layer in layers}
    before, after = tensors_of(small), plain_tensors(done.directory, scheme, "none")
    for name, tensor in before.items():
        relative_error = done.relative_errors.get(name.removesuffix(".weight"))
        if relative_error is None:
            assert torch.equal(after[name], tensor.to(torch.bfloat16)), name
        else:
            error = float((after[name] - tensor).norm() / tensor.norm())
            assert error == pytest.approx(relative_error, rel=1e-3)
            assert 0 < error < TYPICAL[scheme]
    assert model_shape(done.directory).stored == scheme
    assert f"# {small.name}, {scheme}" in (done.directory / "README.md").read_text()
    assert [name for _, _, name in calls] == sorted(before)
    assert calls[-1][:2] == (done.in_bytes, done.in_bytes)


@pytest.mark.parametrize("head", [name for name in HEADS if name != "none"])
def test_the_head_is_quantised_where_asked(
    head: str, family: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    small, _ = family
    name = "model.transformer.ff_out" if small.name == "small" else "lm_head"
    plain = quantize(small, tmp_path / "plain", "nvfp4", head="none").directory
    done = quantize(small, tmp_path / "out", "nvfp4", head=head)
    before, after = tensors_of(small), plain_tensors(done.directory, "nvfp4", head)
    assert before.keys() == after.keys()
    weight = before[name + ".weight"].float()
    error = float((after[name + ".weight"] - weight).norm() / weight.norm())
    assert error == pytest.approx(done.relative_errors[name], rel=1e-3)
    assert 0 < error < TYPICAL.get(head, 0.01)
    shape = model_shape(done.directory)
    assert (shape.stored, shape.head_precision) == ("nvfp4", head)
    saved = model_shape(plain).decode_bytes("nvfp4") - shape.decode_bytes("nvfp4")
    rows, columns = weight.shape
    assert saved + 16 >= 2 * rows * columns - matrix_bytes(head, rows, columns)
    assert f"LM head `{head}`" in (done.directory / "README.md").read_text()


def test_the_output_contains_what_vllm_needs_and_no_code(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "two-files"
    shutil.copytree(small, source, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = sorted(tensors_of(small).items())
    save_file(dict(tensors[::2]), source / "a.safetensors")
    save_file(dict(tensors[1::2]), source / "b.safetensors")
    (source / "modeling_molmo.py").write_text("raise SystemExit")
    (tmp_path / ".molmo-edge-dead").mkdir()  # of a killed run
    directory = quantize(source, tmp_path / "out", "w4a16", head="none").directory
    assert {path.name for path in tmp_path.iterdir()} == {"two-files", "out"}
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert {r"re:^model\.transformer\.ff_out$", "re:.*vision_backbone.*"} < set(config["ignore"])
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 128, True)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    for file in ("a.safetensors", "b.safetensors"):
        assert load_file(directory / file).keys() == {n for n, f in index.items() if f == file}
    assert (directory / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    assert not list(directory.glob("*.py"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(28, "No space left"), QuantizeError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failed_or_interrupted_run_leaves_nothing(
    small: Path, tmp_path: Path, error: BaseException, expected: type[BaseException]
) -> None:
    def stop(done: int, total: int, name: str) -> None:
        if done > total // 2:
            assert not (tmp_path / "out").exists()
            raise error

    with pytest.raises(expected):
        quantize(small, tmp_path / "out", "w4a16", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_refused_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(QuantizeError, match=r"needs 0\.1 GB"):
        quantize(small, tmp_path / "out", "fp8")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_scheme_output_or_input_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="fp8, w4a16, nvfp4"):
        quantize(small, tmp_path / "out", "int3")
    with pytest.raises(QuantizeError, match="none, fp8, w8a16, w4a16"):
        quantize(small, tmp_path / "out", "fp8", head="int3")
    with pytest.raises(ModelError):
        quantize(tmp_path, tmp_path / "out", "fp8")
    once = quantize(small, tmp_path / "once", "fp8").directory
    with pytest.raises(QuantizeError, match="quantised already"):
        quantize(once, tmp_path / "twice", "w4a16")
    with pytest.raises(QuantizeError, match="exists already"):
        quantize(small, once, "fp8")
    assert (once / "config.json").exists()
    config = hub_config(intermediate_size=400)
    odd = write_checkpoint(tmp_path / "odd", config, tower=TOWER)
    with pytest.raises(QuantizeError, match="multiple of the 128"):
        quantize(odd, tmp_path / "out", "w4a16")


LAYER = "model.transformer.blocks.1.ff_out.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAYER), r"lacks 1 tensors, first 'model\.transformer\.blocks\.1\.ff_out"),
        (lambda t: t.update({LAYER: t[LAYER][:, :256].clone()}), "wrong shapes in 1"),
        (lambda t: t.update({LAYER: t[LAYER].to(torch.int8)}), "quantised 1 tensors"),
        (lambda t: t[LAYER].fill_(float("nan")), "contains NaN or infinity"),
    ],
)
def test_a_damaged_checkpoint_is_refused_naming_the_tensor(
    small: Path, tmp_path: Path, change: Any, message: str
) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(small, directory)
    tensors = tensors_of(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises((ModelError, QuantizeError), match=message):
        quantize(directory, tmp_path / "out", "w4a16")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
