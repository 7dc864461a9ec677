"""What cannot be quantised is refused by name, before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from molmo_edge.errors import ModelError, QuantizeError
from molmo_edge.quantize import run as quantize
from tests.quant_support import threads, write_small


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("original") / "small")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


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
        (lambda t: t[LAYER].fill_(float("nan")), "contains NaN or infinity"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_tensor(
    small: Path, tmp_path: Path, change: Any, said: str
) -> None:
    folder = damaged(small, tmp_path / "damaged", change)
    with pytest.raises(QuantizeError, match=said):
        quantize.quantize(folder, tmp_path / "out", "w4a16")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_what_is_no_checkpoint_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        quantize.quantize(tmp_path, tmp_path / "out", "fp8")
