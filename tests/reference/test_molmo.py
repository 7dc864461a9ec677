from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molmo_edge.errors import InputError, SamplingError
from molmo_edge.reference.molmo import ReferenceInputs, ReferenceMolmo, preprocess, sequence
from tests.reference import tiny_reference as tiny
from tests.reference.second_writing import by_hand, features_by_library

TEXT = [tiny.BOS, 17, 55, 103, 199, 4, 4, 88, tiny.IDS.patch, 12]
LAYOUTS = {"7B-D": {}, "7B-O": tiny.LAYOUT_O}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ReferenceMolmo, dict[str, Any], dict[str, torch.Tensor]]:
    config = tiny.config(**LAYOUTS[request.param])
    tensors = tiny.weights(config)
    folder = tiny.write(tmp_path_factory.mktemp(request.param), config, tensors)
    return ReferenceMolmo.load(folder), config, tensors


@pytest.fixture(scope="module")
def image() -> ReferenceInputs:
    """One crop and the global view, with padding on two sides."""
    random = np.random.default_rng(3)
    return preprocess(random.integers(0, 256, (300, 210, 3), dtype=np.uint8), tiny.IDS)


@pytest.fixture(scope="module")
def two_crops() -> ReferenceInputs:
    random = np.random.default_rng(4)
    return preprocess(random.integers(0, 256, (336, 500, 3), dtype=np.uint8), tiny.IDS)


def loaded(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> ReferenceMolmo:
    return ReferenceMolmo.load(tiny.write(folder, config, tensors))


def test_language_model_equals_a_second_writing_by_hand(checkpoint: Any) -> None:
    model, config, tensors = checkpoint
    table = torch.cat(
        [tensors[f"model.transformer.wte.{n}"] for n in ("embedding", "new_embedding")]
    )
    expected = by_hand(tensors, config, table[TEXT].double().numpy())
    found = model.logits(TEXT)
    assert found.shape == (len(TEXT), 208) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)


def test_image_features_equal_torchs_own_layers(
    checkpoint: Any, two_crops: ReferenceInputs
) -> None:
    model, _, tensors = checkpoint
    with torch.no_grad():
        expected = features_by_library(tensors, two_crops)
    found = model.image_features(two_crops)
    assert found.shape == (3, 144, 64)
    assert float(expected.std()) > 0.05  # else the comparison would say little
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_image_adds_its_features_to_the_patch_embeddings(
    checkpoint: Any, two_crops: ReferenceInputs
) -> None:
    model, config, tensors = checkpoint
    ids = sequence(two_crops, [5, 6], tiny.BOS)
    features = model.image_features(two_crops)
    table = torch.cat(
        [tensors[f"model.transformer.wte.{n}"] for n in ("embedding", "new_embedding")]
    )
    x = table[ids].clone()
    for view, places in enumerate(two_crops.image_input_idx):
        for feature, place in zip(features[view], places, strict=True):
            if place != -100:
                assert ids[place] == tiny.IDS.patch
                x[place] += feature
    # The first rows are enough, and cheap by hand: the model is causal.
    expected = by_hand(tensors, config, x[:40].double().numpy())
    np.testing.assert_allclose(model.logits(ids, two_crops)[:40].numpy(), expected, atol=2e-4)


def test_features_of_zero_leave_the_patch_embeddings(
    tmp_path: Path, image: ReferenceInputs
) -> None:
    tensors = tiny.weights(tiny.CONFIG)
    tensors["model.vision_backbone.image_projector.w2.weight"].zero_()
    model = loaded(tmp_path, tiny.CONFIG, tensors)
    ids = sequence(image, [5], tiny.BOS)
    assert torch.equal(model.logits(ids, image), model.logits(ids))


def test_a_image_changes_what_follows_it_and_nothing_before(
    checkpoint: Any, image: ReferenceInputs
) -> None:
    model, _, _ = checkpoint
    ids = sequence(image, [5], tiny.BOS)
    change = (model.logits(ids, image) - model.logits(ids)).abs().amax(-1)
    assert float(change[:2].max()) == 0  # BOS and <im_start>
    assert float(change[2:].min()) > 1e-3


def test_each_crop_belongs_to_its_positions(checkpoint: Any, two_crops: ReferenceInputs) -> None:
    model, _, _ = checkpoint
    ids = sequence(two_crops, [5], tiny.BOS)
    logits = model.logits(ids, two_crops)
    turned = [2, 0, 1]
    together = dataclasses.replace(
        two_crops,
        images=two_crops.images[turned],
        image_masks=two_crops.image_masks[turned],
        image_input_idx=two_crops.image_input_idx[turned],
    )
    torch.testing.assert_close(model.logits(ids, together), logits, atol=1e-4, rtol=1e-4)
    images_only = dataclasses.replace(two_crops, images=two_crops.images[turned])
    assert float((model.logits(ids, images_only) - logits).abs().max()) > 0.1
    positions = two_crops.image_input_idx.copy()
    positions[0, [0, 1]] = positions[0, [1, 0]]
    swapped = dataclasses.replace(two_crops, image_input_idx=positions)
    assert float((model.logits(ids, swapped) - logits).abs().max()) > 0.01


def test_pad_embeddings_follow_the_mask(checkpoint: Any, image: ReferenceInputs) -> None:
    model, _, _ = checkpoint

    def features(mask: float) -> torch.Tensor:
        masks = np.full_like(image.image_masks, mask)
        return model.image_features(dataclasses.replace(image, image_masks=masks))

    none, part, full = features(0.0), features(0.5), features(1.0)
    assert torch.equal(features(-1.0), part)  # the padded row counts as partly covered
    for a, b in ((none, part), (none, full), (part, full)):
        assert float((a - b).abs().max()) > 0.01


def test_a_crop_of_minus_one_everywhere_has_no_features_of_its_own(
    checkpoint: Any, image: ReferenceInputs
) -> None:
    model, _, _ = checkpoint
    images = np.full_like(image.images, -1)
    images[1, 0, 0] = -0.5
    masks = np.ones_like(image.image_masks)
    empty, almost = model.image_features(
        dataclasses.replace(image, images=images, image_masks=masks)
    )
    assert torch.equal(empty, empty[:1].expand_as(empty))
    assert float((almost - almost[:1]).abs().max()) > 0.01


@pytest.mark.parametrize("with_image", [False, True])
def test_cached_decoding_equals_teacher_forcing(
    checkpoint: Any, image: ReferenceInputs, with_image: bool
) -> None:
    model, _, _ = checkpoint
    inputs = image if with_image else None
    ids = sequence(inputs, TEXT[1:], tiny.BOS)
    out = model.generate(ids, inputs, max_tokens=12)
    assert len(out.token_ids) == len(out.logprobs) == 12
    logits = model.logits([*ids.tolist(), *out.token_ids], inputs)[len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == out.token_ids
    forced = model.logprobs_of(ids, out.token_ids, inputs)
    assert out.logprobs == pytest.approx(forced, abs=1e-5)
    assert out.logprobs == pytest.approx(logits.log_softmax(-1).amax(-1).tolist(), abs=1e-5)
    assert len(set(out.token_ids)) > 2  # else the cache would hardly matter


def test_logprobs_of_any_continuation(checkpoint: Any) -> None:
    model, _, _ = checkpoint
    logits = model.logits([*TEXT, 3, 9, 27])
    expected = logits[-4:-1].log_softmax(-1)[torch.arange(3), torch.tensor([3, 9, 27])]
    assert model.logprobs_of(TEXT, [3, 9, 27]) == pytest.approx(expected.tolist(), abs=1e-6)
    assert model.logprobs_of(TEXT, []) == []


def test_generation_ends_with_the_stop_token(checkpoint: Any) -> None:
    model, _, _ = checkpoint
    free = model.generate(TEXT, max_tokens=6)
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    stopped = model.generate(TEXT, max_tokens=6, stop_ids={stop})
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.logprobs == free.logprobs[: first + 1]


def test_tokens_after_the_vocabulary_use_the_new_embedding(tmp_path: Path) -> None:
    tensors = tiny.weights(tiny.CONFIG)
    tensors["model.transformer.wte.new_embedding"][3] = tensors["model.transformer.wte.embedding"][
        7
    ]
    model = loaded(tmp_path, tiny.CONFIG, tensors)
    assert torch.equal(model.logits([1, 208 + 3]), model.logits([1, 7]))
    assert not torch.equal(model.logits([1, 208 + 4]), model.logits([1, 7]))


class CountingMolmo(ReferenceMolmo):
    crops = 0

    def _tower(self, crop: torch.Tensor) -> torch.Tensor:
        self.crops += 1
        return super()._tower(crop)


def test_the_tower_runs_once_a_image(tmp_path: Path, image: ReferenceInputs) -> None:
    model = CountingMolmo.load(tiny.write(tmp_path, tiny.CONFIG, tiny.weights(tiny.CONFIG)))
    assert isinstance(model, CountingMolmo)
    ids = sequence(image, [5], tiny.BOS)
    out = model.generate(ids, image, max_tokens=3)
    model.logprobs_of(ids, out.token_ids, image)
    assert model.crops == 2
    model.generate(ids, dataclasses.replace(image), max_tokens=1)
    assert model.crops == 4


@pytest.mark.parametrize("ids", [[], [-1], [336], [[1, 2]], [1.5], [True]])
def test_token_ids_that_do_not_fit_are_refused(checkpoint: Any, ids: Any) -> None:
    with pytest.raises(InputError, match="Token ids must be"):
        checkpoint[0].generate(ids, max_tokens=1)


def test_unusable_requests_are_refused(checkpoint: Any, image: ReferenceInputs) -> None:
    model, _, _ = checkpoint
    with pytest.raises(InputError, match="0 to 207"):
        model.logprobs_of(TEXT, [208])
    with pytest.raises(InputError, match="image's features"):
        model.logits(TEXT, image)
    with pytest.raises(SamplingError, match="max_tokens"):
        model.generate(TEXT, max_tokens=0)
