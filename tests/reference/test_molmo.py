"""The reference implementation equals models of transformers with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from molmo_edge.errors import InputError
from molmo_edge.reference.molmo import ReferenceMolmo
from molmo_edge.reference.molmo_inputs import ReferenceInputs, preprocess, sequence
from tests.reference import tiny_reference as tiny
from tests.reference.by_transformers import image_features, language_model

TEXT = [17, 55, 103, 199, 4, 4, 88, tiny.IDS.patch, 12]


@pytest.fixture(scope="module", params=[tiny.CONFIG, tiny.CONFIG_O], ids=["7B-D", "7B-O"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ReferenceMolmo, dict[str, Any], tiny.Tensors]:
    tensors = tiny.weights(request.param)
    directory = tiny.write(tmp_path_factory.mktemp("tiny"), request.param, tensors)
    return ReferenceMolmo.load(directory), request.param, tensors


def noise(height: int, width: int) -> ReferenceInputs:
    random = np.random.default_rng(height)
    return preprocess(random.integers(0, 256, (height, width, 3), dtype=np.uint8), tiny.IDS)


@torch.no_grad()
def test_features_and_logits_equal_those_of_clip_qwen2_and_olmo2(checkpoint: Any) -> None:
    model, config, tensors = checkpoint
    two_crops = noise(336, 500)  # patches inside, at the edge of and outside the image
    expected = image_features(tensors, two_crops)
    features = model.image_features(two_crops)
    assert features.shape == (3, 144, 64)
    assert float(expected.std()) > 0.05  # else the comparison would say little
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-4)

    ids = sequence(two_crops, TEXT, tiny.BOS)
    parts = ("embedding", "new_embedding")
    x = torch.cat([tensors[f"model.transformer.wte.{part}"] for part in parts])[ids]
    for view, places in enumerate(two_crops.image_input_idx):
        for feature, place in zip(features[view], places, strict=True):
            if place != -100:
                assert ids[place] == tiny.IDS.patch
                x[place] += feature
    expected = language_model(tensors, config)(inputs_embeds=x[None]).logits[0]
    logits = model.logits(ids, two_crops)
    assert logits.shape == (len(ids), 208) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("with_image", [False, True])
def test_cached_decoding_equals_teacher_forcing_and_ends_with_the_stop_token(
    checkpoint: Any, with_image: bool
) -> None:
    model, _, _ = checkpoint
    inputs = noise(300, 210) if with_image else None
    ids = sequence(inputs, TEXT, tiny.BOS)
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


def test_an_image_that_does_not_fit_its_sequence_is_refused(checkpoint: Any) -> None:
    with pytest.raises(InputError, match="image's features"):
        checkpoint[0].logits([tiny.BOS, *TEXT], noise(300, 210))
