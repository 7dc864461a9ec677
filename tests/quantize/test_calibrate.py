"""Calibration reduces rounding errors and changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from molmo_edge.devices.tensors import Tower
from molmo_edge.errors import QuantizeError
from molmo_edge.models.molmo.config import Layout
from molmo_edge.models.molmo.synthetic import hub_config, random_weights, write_checkpoint
from molmo_edge.quantize import calibrate, quantize
from molmo_edge.quantize.calibrate import LAYERS, choose_images, read_images
from molmo_edge.quantize.formats import format_of
from molmo_edge.quantize.plan import plan
from molmo_edge.reference.molmo import ReferenceMolmo
from molmo_edge.reference.verify import synthetic_image
from tests.quantize.support import plain_tensors, tensors_of


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    Image.fromarray(synthetic_image(60, 80, 0)).save(directory / "0.png")
    (directory / "notes.txt").write_text("not an image")
    return directory


@pytest.fixture(scope="module", params=["7b-d", "7b-o"])
def outliers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose norms and values have a few channels far larger than the rest."""
    layout: Layout = request.param
    plain = random_weights(3)

    def weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        made = plain(name, shape)
        if name.endswith(("attn_norm.weight", "ff_norm.weight")):
            made[::37] *= 12
        if name.endswith(("att_proj.weight", "ff_proj.weight")):
            made[5::41] *= 6
        return made

    directory = tmp_path_factory.mktemp("outliers") / layout
    tower = Tower(blocks=9)
    return write_checkpoint(
        directory, hub_config(layout), tower=tower, weights=weights, dtype=torch.bfloat16
    )


@pytest.fixture(scope="module")
def model(outliers: Path) -> ReferenceMolmo:
    return ReferenceMolmo.load(outliers)


@pytest.fixture(scope="module")
def states(outliers: Path, model: ReferenceMolmo, images: Path) -> list[torch.Tensor]:
    """Inputs of the first block by the reference implementation."""
    prompts = read_images(outliers, choose_images(images))
    with torch.no_grad():
        return [model._embed(ids, seen) for ids, seen in prompts]


def outputs(model: ReferenceMolmo, states: list[torch.Tensor]) -> torch.Tensor:
    """(tokens, hidden): inputs of the LM head, whose many logits would add nothing but time."""
    with torch.no_grad():
        return torch.cat([model._decode(x, model._new_cache()) for x in states])


def test_scales_change_no_answer(
    outliers: Path, images: Path, model: ReferenceMolmo, states: list[torch.Tensor]
) -> None:
    form = format_of("w4a16")
    known = calibrate.calibrate(outliers, plan(outliers, form), form, choose_images(images))
    scaled = {"attn_out", "ff_out"} if model.config.norm_after else set(LAYERS)
    assert {name.rpartition(".")[2] for name in known.scales} == scaled
    assert any(float(s.max() / s.min()) > 1.5 for s in known.scales.values())
    tensors = {name: known.apply(name, t).float() for name, t in tensors_of(outliers).items()}
    changed = outputs(ReferenceMolmo(model.config, dict(tensors)), states)
    assert torch.allclose(changed, outputs(model, states), atol=2e-4)
    for name, stored in tensors.items():  # a scaled norm is stored without rounding
        if name.endswith(("attn_norm.weight", "ff_norm.weight")):
            assert torch.allclose(stored, stored.bfloat16().float(), rtol=1e-6, atol=0)
    # The inputs are those of the reference implementation.
    block = "model.transformer.blocks.0."
    if not model.config.norm_after:
        with torch.no_grad():
            squares = [model._rms_norm(x, block + "attn_norm").square().mean(0) for x in states]
        expected = torch.stack(squares).mean(0)
        assert torch.allclose(known.moments[block + "att_proj"], expected, rtol=1e-4)


def test_calibrated_outputs_are_nearer_to_the_original(
    outliers: Path,
    images: Path,
    model: ReferenceMolmo,
    states: list[torch.Tensor],
    tmp_path: Path,
) -> None:
    free = quantize(outliers, tmp_path / "free", "w4a16").directory
    done = quantize(outliers, tmp_path / "seen", "w4a16", calibrate=images)
    expected = outputs(model, states)

    def error(directory: Path) -> float:
        tensors = {n: t.float() for n, t in plain_tensors(directory, "w4a16").items()}
        other = ReferenceMolmo(model.config, tensors)
        return float((outputs(other, states) - expected).square().mean())

    # Molmo-7B-O's norms come after its layers and cannot take a scale.
    bound = 0.95 if model.config.norm_after else 0.8
    assert error(done.directory) < bound * error(free)
    assert done.images == 1
    assert "Calibrated on 1 image:" in (done.directory / "README.md").read_text()


def test_images_are_spread_over_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0.png", "1.JPG", "2.webp", "3.bmp", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in choose_images(tmp_path)] == ["0.png", "1.JPG", "2.webp", "3.bmp"]
    monkeypatch.setattr(calibrate, "MAX_IMAGES", 2)
    assert [p.name for p in choose_images(tmp_path)] == ["0.png", "2.webp"]


def test_fp8_and_bad_images_are_refused_and_nothing_is_left(
    outliers: Path, images: Path, tmp_path: Path
) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    whole = (images / "0.png").read_bytes()
    (broken / "cut.png").write_bytes(whole[: len(whole) // 2])
    cases: list[tuple[str, Any, str]] = [
        ("fp8", images, "gains nothing in fp8"),
        ("w4a16", tmp_path / "nowhere", "is not a directory with images"),
        ("w4a16", empty, "is not a directory with images"),
        ("w4a16", broken, r"cut\.png' cannot be calibrated on"),
    ]
    for scheme, given, message in cases:
        with pytest.raises(QuantizeError, match=message):
            quantize(outliers, tmp_path / "out", scheme, calibrate=given)
        assert not list(tmp_path.glob("*out*"))
