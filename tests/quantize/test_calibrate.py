"""Calibration reduces rounding errors and changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from molmo_edge.checkpoint_files import read_config, tensors
from molmo_edge.devices.tensors import Tower
from molmo_edge.errors import QuantizeError
from molmo_edge.models.molmo.synthetic import hub_config, random_weights, write_checkpoint
from molmo_edge.models.molmo2 import synthetic as molmo2
from molmo_edge.quantize import quantize
from molmo_edge.quantize.calibrate import MAX_IMAGES, Prompt, calibrate, read_prompts
from molmo_edge.quantize.formats import FORMATS
from molmo_edge.reference.checkpoint import text_config
from molmo_edge.reference.common import ReferenceModel
from molmo_edge.reference.molmo import ReferenceMolmo
from molmo_edge.reference.molmo2 import ReferenceMolmo2
from molmo_edge.reference.verify import synthetic_image
from tests.quantize.support import plain_tensors, tensors_of


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    Image.fromarray(synthetic_image(60, 80, 0)).save(directory / "0.png")
    (directory / "notes.txt").write_text("not an image")
    return directory


@pytest.fixture(scope="module", params=["7b-d", "7b-o", "molmo2 4b", "molmo2 o-7b"])
def outliers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose norms and values have a few channels far larger than the rest."""
    layout: Any = request.param.removeprefix("molmo2 ")
    plain = random_weights(3)

    def weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        made = plain(name, shape)
        if name.endswith(("attn_norm.weight", "ff_norm.weight")):
            made[::37] *= 12
        if name.endswith(("att_proj.weight", "ff_proj.weight")):
            made[5::41] *= 6
        return made

    directory = tmp_path_factory.mktemp("outliers") / layout
    if layout != request.param:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        config = molmo2.hub_config(layout, text=sizes)
        return molmo2.write_checkpoint(directory, config, weights=weights, dtype=torch.bfloat16)
    return write_checkpoint(
        directory, hub_config(layout), tower=Tower(blocks=9), weights=weights, dtype=torch.bfloat16
    )


@pytest.fixture(scope="module")
def prompt(outliers: Path, images: Path) -> Prompt:
    return read_prompts(outliers, images)[0]


def reference(directory: Path, weights: dict[str, torch.Tensor]) -> ReferenceModel[Any]:
    config = read_config(directory)
    if config["model_type"] == "molmo2":
        return ReferenceMolmo2(config, weights)
    return ReferenceMolmo(text_config(config), weights)


@pytest.fixture(scope="module")
def model(outliers: Path) -> ReferenceModel[Any]:
    weights = {name: tensor.float() for name, tensor in tensors_of(outliers).items()}
    return reference(outliers, weights)


@pytest.fixture(scope="module")
def expected(model: ReferenceModel[Any], prompt: Prompt) -> torch.Tensor:
    return model.logits(*prompt)


def test_scales_change_no_answer(
    outliers: Path, model: ReferenceModel[Any], prompt: Prompt, expected: torch.Tensor
) -> None:
    form = FORMATS["w4a16"]
    known = calibrate(
        read_config(outliers),
        tensors(outliers),
        form,
        form,
        [prompt],
        lambda done, total, name: None,
    )
    scaled = {name: tensor.float() for name, tensor in tensors_of(outliers).items()}
    for name in scaled:
        for factor in known.factors.get(name, ()):
            scaled[name] = scaled[name] * factor
    layers = {name.split(".")[-2] for name in known.factors if name in scaled}
    norms = set() if model.config.norm_after else {"attn_norm", "ff_norm"}
    head = model.LM_HEAD.split(".")[-1]
    assert layers == {"att_proj", "attn_out", "ff_proj", "ff_out", head, "ln_f"} | norms
    assert model.LM_HEAD + ".weight" in known.factors
    assert any(f.max() > 1.5 * f.min() for parts in known.factors.values() for f in parts)
    changed = reference(outliers, scaled).logits(*prompt)
    assert torch.allclose(changed, expected, atol=1e-3)


def test_calibrated_outputs_are_nearer_to_the_original(
    outliers: Path,
    images: Path,
    model: ReferenceModel[Any],
    prompt: Prompt,
    expected: torch.Tensor,
    tmp_path: Path,
) -> None:
    free = quantize(outliers, tmp_path / "free", "w4a16").directory
    done = quantize(outliers, tmp_path / "seen", "w4a16", calibrate=images)

    def error(directory: Path) -> float:
        weights = {n: t.float() for n, t in plain_tensors(directory, "w4a16").items()}
        logits = reference(outliers, weights).logits(*prompt)
        return float((logits - expected).square().mean())

    # OLMo's norms come after its layers and cannot take a scale.
    bound = 0.95 if model.config.norm_after else 0.8
    assert error(done.directory) < bound * error(free)
    assert done.images == 1
    assert "Calibration images: 1." in (done.directory / "README.md").read_text()


def test_of_many_images_some_are_used(outliers: Path, tmp_path: Path) -> None:
    for i in range(MAX_IMAGES + 3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{i}.png")
    assert len(read_prompts(outliers, tmp_path)) == MAX_IMAGES


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
