"""Calibration reduces rounding errors and changes nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from molmo_edge.devices.tensors import BLOCKS
from molmo_edge.errors import QuantizeError
from molmo_edge.models.molmo.synthetic import Family, Shape, random_weights, write_checkpoint
from molmo_edge.quantize import calibrate, quantize
from molmo_edge.quantize.calibrate import LAYERS, Calibration, Streamed, image_files, read_images
from molmo_edge.quantize.formats import format_of
from molmo_edge.quantize.plan import plan
from molmo_edge.reference.molmo import ReferenceInputs, ReferenceMolmo
from molmo_edge.reference.verify import synthetic_image
from tests.quantize.support import plain_tensors, tensors_of, threads

SHAPE = Shape(vit_blocks=9, heads=4, kv_heads=2)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with threads(2):
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    for seed in range(2):
        Image.fromarray(synthetic_image(60, 80, seed)).save(directory / f"{seed}.png")
    (directory / "notes.txt").write_text("not an image")
    return directory


def with_outliers(
    directory: Path, family: Family = "molmo-d", dtype: torch.dtype = torch.float32
) -> Path:
    """A checkpoint whose norms and values have a few channels far larger than the rest."""
    plain = random_weights(3)

    def weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        made = plain(name, shape)
        if name.endswith(("attn_norm.weight", "ff_norm.weight")):
            made[::37] *= 12
        if name.endswith(("att_proj.weight", "ff_proj.weight")):
            made[5::41] *= 6
        return made

    return write_checkpoint(directory, family, shape=SHAPE, weights=weights, dtype=dtype)


@pytest.fixture(scope="module", params=["molmo-d", "molmo-o"])
def outliers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_outliers(tmp_path_factory.mktemp("outliers") / request.param, request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_outliers(tmp_path_factory.mktemp("one") / "molmo-d", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def known(one: Path, images: Path) -> Calibration:
    return calibrated(one, images)


def calibrated(directory: Path, images: Path, scheme: str = "w4a16") -> Calibration:
    form = format_of(scheme)
    planned = plan(directory, form)
    return calibrate.calibrate(directory, planned, form, image_files(images))


Prompts = list[tuple[Any, ReferenceInputs]]


@pytest.fixture(scope="module")
def prompts(one: Path, images: Path) -> Prompts:
    """The same tokens for both families."""
    return read_images(one, image_files(images))


@pytest.fixture(scope="module")
def whole(outliers: Path) -> ReferenceMolmo:
    return ReferenceMolmo.load(outliers)


@pytest.fixture(scope="module")
def states_in(whole: ReferenceMolmo, prompts: Prompts) -> list[torch.Tensor]:
    """Inputs of the first block by the reference implementation."""
    with torch.no_grad():
        return [whole._embed(ids, seen) for ids, seen in prompts]


def outputs(model: ReferenceMolmo, states_in: list[torch.Tensor]) -> torch.Tensor:
    """(tokens, hidden): inputs of the LM head, whose many logits would add nothing but time."""
    with torch.no_grad():
        return torch.cat([model._decode(x, model._new_cache()) for x in states_in])


def test_streaming_gives_the_states_of_the_reference_implementation(
    outliers: Path, whole: ReferenceMolmo, states_in: list[torch.Tensor], prompts: Prompts
) -> None:
    planned = plan(outliers, format_of("w4a16"))
    names = {tensor.name: tensor.file for shard in planned.shards for tensor in shard}
    streamed = Streamed(outliers, whole.config, names)
    states = streamed.states(prompts)
    for state, expected in zip(states, states_in, strict=True):
        assert torch.allclose(state, expected, atol=1e-5)
    for _, inputs, weights in streamed.blocks(states):
        assert set(inputs) == set(LAYERS)
        assert len({name.split(".")[3] for name in weights}) == 1
    last = whole._rms_norm(torch.cat(states), "model.transformer.ln_f")
    assert torch.allclose(last, outputs(whole, states_in), atol=1e-4)


def test_scales_change_no_answer(
    outliers: Path, images: Path, whole: ReferenceMolmo, states_in: list[torch.Tensor]
) -> None:
    known = calibrated(outliers, images)
    folded = {"attn_out", "ff_out"} if whole.config.norm_after else set(LAYERS)
    assert {name.rpartition(".")[2] for name in known.scales} == folded
    assert any(float(s.max() / s.min()) > 1.5 for s in known.scales.values())
    tensors = {name: known.apply(name, t).float() for name, t in tensors_of(outliers).items()}
    changed = outputs(ReferenceMolmo(whole.config, tensors), states_in)
    assert torch.allclose(changed, outputs(whole, states_in), atol=2e-4)


def test_a_scaled_norm_is_stored_without_rounding(one: Path, known: Calibration) -> None:
    for name, value in tensors_of(one).items():
        if name.endswith(("attn_norm.weight", "ff_norm.weight")):
            stored = known.apply(name, value)
            assert torch.allclose(stored, stored.bfloat16().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4"])
def test_calibrated_outputs_are_nearer_to_the_original(
    outliers: Path,
    images: Path,
    whole: ReferenceMolmo,
    states_in: list[torch.Tensor],
    tmp_path: Path,
    scheme: str,
) -> None:
    free = quantize(outliers, tmp_path / "free", scheme).folder
    done = quantize(outliers, tmp_path / "seen", scheme, calibrate=images)
    expected = outputs(whole, states_in)

    def error(directory: Path) -> float:
        tensors = {n: t.float() for n, t in plain_tensors(directory, scheme).items()}
        model = ReferenceMolmo(whole.config, tensors)
        return float((outputs(model, states_in) - expected).square().mean())

    # Molmo-7B-O's norms come after its layers and cannot take a scale.
    bound = 0.95 if whole.config.norm_after else 0.8
    assert error(done.folder) < bound * error(free)
    assert done.pictures == 2
    card = (done.folder / "README.md").read_text()
    assert "Calibrated on 2 images" in card and "No images" not in card
    assert set(tensors_of(done.folder)) == set(tensors_of(free))
    assert {p.name for p in done.folder.iterdir()} == {p.name for p in free.iterdir()}


def test_images_are_spread_over_the_directory(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [p.name for p in image_files(images)] == ["0.png", "1.png"]
    monkeypatch.setattr(calibrate, "MAX_IMAGES", 1)
    assert [p.name for p in image_files(images)] == ["0.png"]


def test_fp8_is_refused(one: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="gains nothing in fp8"):
        quantize(one, tmp_path / "out", "fp8", calibrate=images)
    assert list(tmp_path.iterdir()) == []


def test_bad_images_are_named_and_nothing_is_left(
    one: Path, images: Path, tmp_path: Path
) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    whole = (images / "0.png").read_bytes()
    (broken / "cut.png").write_bytes(whole[: len(whole) // 2])
    for given, message in (
        (tmp_path / "nowhere", "is not a directory"),
        (images / "notes.txt", "is not a directory"),
        (empty, "contains no images"),
        (broken, r"cut\.png' cannot be calibrated on"),
    ):
        with pytest.raises(QuantizeError, match=message):
            quantize(one, tmp_path / "out", "w4a16", calibrate=given)
        assert not list(tmp_path.glob("*out*"))


def test_weights_with_nan_are_named(
    one: Path, images: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(one, directory)
    tensors = tensors_of(directory)
    tensors[f"{BLOCKS}1.ff_proj.weight"][3, 4] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(QuantizeError, match=r"blocks\.1\.ff_proj\.weight' contains"):
        quantize(directory, tmp_path / "out", "w4a16", calibrate=images)
    assert not list(tmp_path.glob("*out*"))


def test_moments_are_those_of_all_tokens(
    one: Path, known: Calibration, prompts: Prompts
) -> None:
    model = ReferenceMolmo.load(one)
    with torch.no_grad():
        states = torch.cat([model._embed(ids, seen) for ids, seen in prompts])
    expected = model._rms_norm(states, f"{BLOCKS}0.attn_norm").square().mean(0)
    assert torch.allclose(known.moments[f"{BLOCKS}0.att_proj"], expected, rtol=1e-4)
