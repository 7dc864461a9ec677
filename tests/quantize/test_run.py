"""Quantised checkpoints are complete or absent and contain what vLLM needs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from molmo_edge.devices.tensors import Tower
from molmo_edge.errors import ModelError, QuantizeError
from molmo_edge.models.molmo.synthetic import write_checkpoint
from molmo_edge.quantize import quantize, run
from molmo_edge.quantize.formats import format_of, unpack
from tests.quantize.support import SCHEMES, TYPICAL, layer_of, tensors_of


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32 whose tower has one block; no engine loads it."""
    directory = tmp_path_factory.mktemp("original") / "small"
    return write_checkpoint(directory, seed=3, tower=Tower(blocks=1), dtype=torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_language_models_linear_layers_are_quantised(
    scheme: str, small: Path, tmp_path: Path
) -> None:
    calls: list[tuple[int, int, str]] = []
    done = quantize(small, tmp_path / "out", scheme, progress=lambda *call: calls.append(call))
    blocks = {f"model.transformer.blocks.{i}." for i in range(2)}
    layers = ("att_proj", "attn_out", "ff_proj", "ff_out")
    assert set(done.relative_errors) == {block + layer for block in blocks for layer in layers}
    before, after = tensors_of(small), tensors_of(done.directory)
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in done.relative_errors:
            assert torch.equal(after[name], tensor.to(torch.bfloat16)), name
    for layer, relative_error in done.relative_errors.items():
        stored = unpack(layer_of(after, layer), format_of(scheme))
        weight = before[layer + ".weight"]
        error = float((stored - weight).norm() / weight.norm())
        assert error == pytest.approx(relative_error, rel=1e-3)
        assert 0 < error < TYPICAL[scheme]
    assert f"# small, {scheme}" in (done.directory / "README.md").read_text()
    assert [name for _, _, name in calls] == sorted(before)
    assert calls[-1][:2] == (done.in_bytes, done.in_bytes)


def test_the_output_contains_what_vllm_needs_and_no_code(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SHARD_BYTES", 1 << 20)
    (small / "modeling_molmo.py").write_text("raise SystemExit")
    directory = quantize(small, tmp_path / "out", "w4a16").directory
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert {r"re:^model\.transformer\.ff_out$", "re:.*vision_backbone.*"} < set(config["ignore"])
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 128, True)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    for file in set(index.values()):
        with safe_open(directory / file, framework="pt") as opened:
            assert set(opened.keys()) == {n for n, f in index.items() if f == file}
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
            raise error

    with pytest.raises(expected):
        quantize(small, tmp_path / "out", "w4a16", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_output_and_the_next_one_deletes_its_files(
    small: Path, tmp_path: Path
) -> None:
    killed = """
import os, signal, sys
from molmo_edge.quantize import quantize
kill = lambda done, total, name: os.kill(os.getpid(), signal.SIGKILL)
quantize(sys.argv[1], sys.argv[2], "fp8", progress=kill)
"""
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", killed, small, out], check=False, timeout=100)
    assert ended.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.quantize"]
    assert quantize(small, out, "fp8").directory == out
    assert list(tmp_path.iterdir()) == [out]


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
    with pytest.raises(ModelError):
        quantize(tmp_path, tmp_path / "out", "fp8")
    once = quantize(small, tmp_path / "once", "fp8").directory
    with pytest.raises(QuantizeError, match="quantised already"):
        quantize(once, tmp_path / "twice", "w4a16")
    with pytest.raises(QuantizeError, match="exists already"):
        quantize(small, once, "fp8")
    assert (once / "config.json").exists()


LAYER = "model.transformer.blocks.1.ff_out.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAYER), "lacks 1 tensors, first 'model.transformer.blocks.1.ff_out"),
        (lambda t: t.pop("model.vision_backbone.pad_embed"), "pad_embed"),
        (lambda t: t.update({LAYER: t[LAYER][:, :256].clone()}), "config.json asks for"),
        (lambda t: t.update({LAYER: t[LAYER].to(torch.int8)}), "stored as I8"),
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
    with pytest.raises(QuantizeError, match=message):
        quantize(directory, tmp_path / "out", "w4a16")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
