"""The reference implementation equals a second one, written another way."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from molmo_edge.errors import InputError
from molmo_edge.reference.molmo import ReferenceMolmo
from molmo_edge.reference.molmo_inputs import ReferenceInputs, preprocess, sequence
from tests.reference import tiny_reference as tiny
from tests.reference.second_writing import by_hand, features_by_library

TEXT = [tiny.BOS, 17, 55, 103, 199, 4, 4, 88, tiny.IDS.patch, 12]


@pytest.fixture(scope="module", params=[tiny.CONFIG, tiny.CONFIG_O], ids=["7B-D", "7B-O"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ReferenceMolmo, dict[str, Any], tiny.Tensors]:
    tensors = tiny.weights(request.param)
    directory = tiny.write(tmp_path_factory.mktemp("tiny"), request.param, tensors)
    return ReferenceMolmo.load(directory), request.param, tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ReferenceMolmo:
    directory = tmp_path_factory.mktemp("tiny")
    return ReferenceMolmo.load(tiny.write(directory, tiny.CONFIG, tiny.weights(tiny.CONFIG)))


def noise(height: int, width: int) -> ReferenceInputs:
    random = np.random.default_rng(height)
    return preprocess(random.integers(0, 256, (height, width, 3), dtype=np.uint8), tiny.IDS)


@pytest.fixture(scope="module")
def image() -> ReferenceInputs:
    """One crop and the global view, with padding on two sides."""
    return noise(300, 210)


@pytest.fixture(scope="module")
def two_crops() -> ReferenceInputs:
    return noise(336, 500)


def embedding_table(tensors: tiny.Tensors) -> torch.Tensor:
    parts = ("embedding", "new_embedding")
    return torch.cat([tensors[f"model.transformer.wte.{part}"] for part in parts])


def test_language_model_equals_a_second_writing_by_hand(checkpoint: Any) -> None:
    model, config, tensors = checkpoint
    expected = by_hand(tensors, config, embedding_table(tensors)[TEXT].double().numpy())
    logits = model.logits(TEXT)
    assert logits.shape == (len(TEXT), 208) and logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), expected, atol=2e-4)


def test_image_features_equal_torchs_own_layers_and_are_added_to_the_patch_embeddings(
    checkpoint: Any, two_crops: ReferenceInputs
) -> None:
    model, config, tensors = checkpoint
    with torch.no_grad():
        expected = features_by_library(tensors, two_crops)
        features = model.image_features(two_crops)
    assert features.shape == (3, 144, 64)
    assert float(expected.std()) > 0.05  # else the comparison would say little
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-4)

    ids = sequence(two_crops, [5, 6], tiny.BOS)
    x = embedding_table(tensors)[ids].clone()
    for view, places in enumerate(two_crops.image_input_idx):
        for feature, place in zip(features[view], places, strict=True):
            if place != -100:
                assert ids[place] == tiny.IDS.patch
                x[place] += feature
    # The first rows are enough, and cheap by hand: the model is causal.
    expected = by_hand(tensors, config, x[:40].double().numpy())
    np.testing.assert_allclose(model.logits(ids, two_crops)[:40].numpy(), expected, atol=2e-4)


@torch.no_grad()
def test_pad_embeddings_follow_the_mask(model: ReferenceMolmo, image: ReferenceInputs) -> None:
    def features(mask: float) -> torch.Tensor:
        masks = np.full_like(image.image_masks, mask)
        return model.image_features(dataclasses.replace(image, image_masks=masks))

    none, part, full = features(0.0), features(0.5), features(1.0)
    assert torch.equal(features(-1.0), part)  # the padded row counts as partly covered
    for a, b in ((none, part), (none, full), (part, full)):
        assert float((a - b).abs().max()) > 0.01


@torch.no_grad()
def test_a_crop_of_minus_one_everywhere_has_no_features_of_its_own(
    model: ReferenceMolmo, image: ReferenceInputs
) -> None:
    images = np.full_like(image.images, -1)
    images[1, 0, 0] = -0.5
    masks = np.ones_like(image.image_masks)
    empty, almost = model.image_features(
        dataclasses.replace(image, images=images, image_masks=masks)
    )
    assert torch.equal(empty, empty[:1].expand_as(empty))
    assert float((almost - almost[:1]).abs().max()) > 0.01


@pytest.mark.parametrize("with_image", [False, True])
def test_cached_decoding_equals_teacher_forcing_and_ends_with_the_stop_token(
    checkpoint: Any, image: ReferenceInputs, with_image: bool
) -> None:
    model, _, _ = checkpoint
    inputs = image if with_image else None
    ids = sequence(inputs, TEXT[1:], tiny.BOS)
    out = model.generate(ids, inputs, max_tokens=12)
    assert len(out.token_ids) == len(out.logprobs) == 12
    logits = model.logits([*ids.tolist(), *out.token_ids], inputs)[len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == out.token_ids
    assert out.logprobs == pytest.approx(logits.log_softmax(-1).amax(-1).tolist(), abs=1e-5)
    assert len(set(out.token_ids)) > 2  # else the cache would hardly matter
    stop = out.token_ids[3]
    end = out.token_ids.index(stop) + 1
    stopped = model.generate(ids, inputs, max_tokens=12, stop_ids={stop})
    assert (stopped.token_ids, stopped.logprobs) == (out.token_ids[:end], out.logprobs[:end])


def test_an_image_that_does_not_fit_its_sequence_is_refused(
    model: ReferenceMolmo, image: ReferenceInputs
) -> None:
    with pytest.raises(InputError, match="image's features"):
        model.logits(TEXT, image)
