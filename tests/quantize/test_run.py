"""Quantised checkpoints are complete or absent and contain what vLLM needs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from molmo_edge.errors import ModelError, QuantizeError
from molmo_edge.quantize import plan as planning
from molmo_edge.quantize import quantize, run
from molmo_edge.quantize.formats import format_of, unpack
from tests.quantize.support import (
    SCHEMES,
    TYPICAL,
    layer_of,
    tensors_of,
    threads,
    write_small,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("original") / "small")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Output files of a few tensors each."""
    monkeypatch.setattr(planning, "SHARD_BYTES", 1 << 20)
    yield


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_language_models_linear_layers_are_packed(
    scheme: str, small: Path, tmp_path: Path
) -> None:
    done = quantize(small, tmp_path / "out", scheme)
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


def test_the_config_contains_what_vllm_needs(small: Path, tmp_path: Path) -> None:
    directory = quantize(small, tmp_path / "out", "w4a16").folder
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert r"re:^model\.transformer\.ff_out$" in config["ignore"]
    assert "re:.*vision_backbone.*" in config["ignore"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 128, True)


def test_the_card_names_the_scheme_and_every_layers_error(small: Path, tmp_path: Path) -> None:
    done = quantize(small, tmp_path / "out", "fp8")
    card = (done.folder / "README.md").read_text()
    assert "# small, fp8" in card
    for layer, error in done.relative_errors.items():
        assert f"| `{layer}` | {error:.4f} |" in card


def test_the_index_names_every_tensor_and_data_files_come_along(
    small: Path, tmp_path: Path, shards: None
) -> None:
    (small / "modeling_molmo.py").write_text("raise SystemExit")
    directory = quantize(small, tmp_path / "out", "w4a16").folder
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    for file in set(index.values()):
        with safe_open(directory / file, framework="pt") as opened:
            assert set(opened.keys()) == {n for n, f in index.items() if f == file}
    assert (directory / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    assert not list(directory.glob("*.py"))
    assert {path.name for path in directory.parent.iterdir()} == {"out"}


def test_progress_ends_at_the_total(small: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    done = quantize(
        small, tmp_path / "out", "fp8", progress=lambda *args: calls.append(args)
    )
    counts = [count for count, _, _ in calls]
    assert counts == sorted(counts)
    assert calls[-1][:2] == (done.in_bytes, done.in_bytes)
    assert len(calls) == len(tensors_of(small))


def test_an_interrupted_run_leaves_nothing(small: Path, tmp_path: Path, shards: None) -> None:
    def stop(done: int, total: int, name: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(small, tmp_path / "out", "w4a16", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_deletes_what_a_killed_one_left(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed run leaves no output; a run that is still going keeps its files."""
    killed = """
import os, signal, sys
from pathlib import Path
from molmo_edge.quantize import quantize
kill = lambda done, total, name: os.kill(os.getpid(), signal.SIGKILL)
quantize(Path(sys.argv[1]), Path(sys.argv[2]), "fp8", progress=kill)
"""
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", killed, small, out], check=False, timeout=100)
    assert ended.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")

    def again(done: int, total: int, name: str) -> None:
        if done == total:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
            with pytest.raises(QuantizeError, match="GB free"):
                quantize(small, out, "fp8")

    full = shutil.disk_usage(tmp_path)._replace(free=0)
    assert quantize(small, out, "fp8", progress=again).folder == out
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("other")])
def test_a_failure_leaves_nothing(
    small: Path, tmp_path: Path, shards: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save, calls = run.save, []

    def fail(path: Path, tensors: dict[str, Any]) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise error
        save(path, tensors)

    monkeypatch.setattr(run, "save", fail)
    expected = QuantizeError if isinstance(error, OSError) else ValueError
    with pytest.raises(expected):
        quantize(small, tmp_path / "out", "fp8")
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_refused_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(QuantizeError, match=r"needs 0\.1 GB"):
        quantize(small, tmp_path / "out", "fp8")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheme_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="fp8, w4a16, nvfp4"):
        quantize(small, tmp_path / "out", "int3")


def test_an_existing_output_is_left_alone(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(QuantizeError, match="exists already"):
        quantize(small, out, "fp8")
    assert (out / "kept").exists()


def test_a_quantised_checkpoint_is_refused(small: Path, tmp_path: Path) -> None:
    once = quantize(small, tmp_path / "once", "fp8").folder
    with pytest.raises(QuantizeError, match="quantised already"):
        quantize(once, tmp_path / "twice", "w4a16")


def damaged(small: Path, directory: Path, change: Any) -> Path:
    """A copy of the checkpoint with other tensors."""
    shutil.copytree(small, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


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
    directory = damaged(small, tmp_path / "damaged", change)
    with pytest.raises(QuantizeError, match=message):
        quantize(directory, tmp_path / "out", "w4a16")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_directory_without_a_checkpoint_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        quantize(tmp_path, tmp_path / "out", "fp8")
