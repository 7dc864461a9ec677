"""The reference implementation of Molmo 2 equals AllenAI's code: prompts, pixels, logprobs."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molmo_edge.devices.tensors import molmo2_tensor_shapes
from molmo_edge.errors import InputError, ModelError
from molmo_edge.models.molmo2.synthetic import hub_config, write_checkpoint
from molmo_edge.models.synthetic import random_weights
from molmo_edge.reference.molmo2 import ReferenceMolmo2
from molmo_edge.reference.molmo2_inputs import Molmo2Inputs, Molmo2Processor
from tests import molmo2_golden as golden

Checkpoint = tuple[ReferenceMolmo2, Molmo2Processor]
CASES = [(variant, case) for variant in golden.VARIANTS for case in golden.cases(variant)]
PATCHES = 27 * 27


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    out = {}
    for variant in golden.VARIANTS:
        directory = golden.write(tmp_path_factory.mktemp(variant), variant)
        out[variant] = ReferenceMolmo2.load(directory), Molmo2Processor(directory)
    return out


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def pooling_by_image(inputs: Molmo2Inputs, features: list[int], crops: list[int]) -> np.ndarray:
    """Indices that count from each image's first patch, as AllenAI's do."""
    first = np.repeat(np.cumsum([0, *crops[:-1]]) * PATCHES, features)[:, None]
    return np.where(inputs.pooling < 0, -1, inputs.pooling - first)


@pytest.mark.parametrize(("variant", "case"), CASES, ids=[f"{v}-{c['name']}" for v, c in CASES])
def test_prompt_pixels_tokens_and_logprobs_are_those_of_allenais_code(
    checkpoints: dict[str, Checkpoint], variant: str, case: dict[str, Any]
) -> None:
    model, processor = checkpoints[variant]
    images = [golden.image(*image) for image in case.get("images", ())]
    video = case.get("video")
    clip = (golden.video(*video[:4]), case["timestamps"]) if video else None
    turns = case.get("turns") or [("user", case["text"])]
    ids, inputs = processor(turns, images, clip)
    assert ids == case["prompt_token_ids"]
    if inputs is not None:
        if video:
            pixels, pooling = case["pixel_values_videos"], case["video_token_pooling"]
            features, crops = [len(inputs.pooling)], [len(inputs.patches)]
        else:
            pixels, pooling = case["pixel_values"], case["image_token_pooling"]
            features = [a * b + c * d for a, b, c, d in case["image_grids"]]
            crops = case["image_num_crops"]
        assert digest(inputs.patches) == pixels["sha256_16"]
        assert digest(pooling_by_image(inputs, features, crops)) == pooling["sha256_16_int64"]
    answer = model.generate(ids, inputs, max_tokens=len(case["tokens"]))
    assert answer.token_ids == case["tokens"]
    assert answer.logprobs == pytest.approx(case["logprobs"], abs=5e-5)


@pytest.mark.parametrize("case", golden.golden("extra")["images"], ids=lambda c: str(c["size"]))
def test_images_of_every_size_give_the_published_pixels_and_windows(
    checkpoints: dict[str, Checkpoint], case: dict[str, Any]
) -> None:
    _, inputs = checkpoints["qwen3"][1]([], [golden.image(case["seed"], *case["size"])])
    assert inputs is not None and len(inputs.patches) == case["crops"]
    assert digest(inputs.patches) == case["pixel_sha"]
    assert digest(inputs.pooling) == case["pooling_sha"]


@pytest.mark.parametrize("case", golden.golden("extra")["crops"], ids=str)
def test_max_crops_limits_the_crops(
    checkpoints: dict[str, Checkpoint], case: dict[str, Any]
) -> None:
    width, height = case["size"]
    processor = checkpoints["qwen3"][1]
    ids, inputs = processor([], [golden.image(0, width, height)], max_crops=case["max_crops"])
    assert inputs is not None and len(inputs.patches) == case["crops"]
    assert int(checkpoints["qwen3"][0]._two_way(ids).sum()) == case["tokens"]


IMAGE = re.compile(
    "<low_res_im_start>(<im_patch>)+<im_end><im_start>((<im_patch>)+<im_col>)+<im_end>"
)


def templates() -> list[tuple[list[tuple[str, str]], int, str]]:
    """(role, text) of each turn, number of images, and the text they give."""
    out = []
    for case in golden.golden("extra")["template"]:
        contents = [(m["role"], m["content"]) for m in case["messages"]]
        parts = [p for _, c in contents if not isinstance(c, str) for p in c]
        if {p["type"] for p in parts} <= {"text", "image"} and not any("style" in p for p in parts):
            turns = [
                (role, c if isinstance(c, str) else " ".join(p["text"] for p in c if "text" in p))
                for role, c in contents
            ]
            out.append((turns, sum(p["type"] == "image" for p in parts), case["text"]))
    return [case for case in out if not case[2].startswith("ERROR")]


@pytest.mark.parametrize(("turns", "images", "text"), templates())
def test_conversations_follow_the_chat_template(
    checkpoints: dict[str, Checkpoint], turns: list[tuple[str, str]], images: int, text: str
) -> None:
    processor = checkpoints["qwen3"][1]
    ids, _ = processor(turns, [golden.image(0, 30, 20)] * images)
    assert ids[0] == processor.bos
    said = processor.tokenizer.decode(ids[1:], skip_special_tokens=False)
    assert IMAGE.sub("<|image|>", said) == text


def test_a_grid_of_another_size_than_the_table_of_positions_resizes_the_table() -> None:
    config = hub_config(vit={"image_default_input_size": [126, 126]})
    make = random_weights(0)
    weights = {name: make(name, shape) for name, shape in molmo2_tensor_shapes(config).items()}
    table = weights["model.vision_backbone.image_vit.positional_embedding"]
    rows, columns = torch.meshgrid(torch.arange(27.0), torch.arange(27.0), indexing="ij")
    table[:, 0], table[:, 1] = rows.flatten(), columns.flatten()
    model = ReferenceMolmo2(config, weights)
    assert torch.equal(model._positions(27), table)
    inner = model._positions(9).unflatten(0, (9, 9))[2:-2, 2:-2]
    # Centres of 3 x 3 patches.
    expected = torch.arange(7.0, 20, 3)
    torch.testing.assert_close(inner[..., 0], expected[:, None].expand(5, 5))
    torch.testing.assert_close(inner[..., 1], expected.expand(5, 5))


def test_what_it_does_not_compute_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    model, processor = ReferenceMolmo2.load(directory), Molmo2Processor(directory)
    ids, inputs = processor([("user", "Hi")], [golden.image(0, 30, 20)])
    with pytest.raises(InputError, match="392 features, but the sequence has 391"):
        model.logits([i for n, i in enumerate(ids) if n != 5], inputs)
    (directory / "config.json").write_text('{"model_type": "molmo"}')
    with pytest.raises(ModelError, match="Molmo 2"):
        ReferenceMolmo2.load(directory)
