"""A quantised checkpoint is whole or not there, and holds what vLLM must know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from molmo_edge.errors import QuantizeError
from molmo_edge.quantize import plan as quant_plan
from molmo_edge.quantize import run as quantize
from molmo_edge.quantize.formats import format_of, unpack
from tests.quant_support import (
    SCHEMES,
    TYPICAL,
    Killed,
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
    monkeypatch.setattr(quant_plan, "SHARD_BYTES", 1 << 20)
    yield


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


def test_a_stopped_run_leaves_nothing_and_can_be_started_again(
    small: Path, tmp_path: Path, shards: None
) -> None:
    def stop(done: int, total: int, name: str) -> None:
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        quantize.quantize(small, tmp_path / "out", "w4a16", progress=stop)
    assert list(tmp_path.iterdir()) == []
    # What a SIGKILL leaves is not in the way.
    (tmp_path / ".out.x.partial").mkdir()
    assert quantize.quantize(small, tmp_path / "out", "w4a16").folder.is_dir()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("other")])
def test_a_failure_leaves_nothing(
    small: Path, tmp_path: Path, shards: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save, calls = quantize.save, []

    def fail(path: Path, tensors: dict[str, Any]) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise error
        save(path, tensors)

    monkeypatch.setattr(quantize, "save", fail)
    expected = QuantizeError if isinstance(error, OSError) else ValueError
    with pytest.raises(expected):
        quantize.quantize(small, tmp_path / "out", "fp8")
    assert list(tmp_path.iterdir()) == []
