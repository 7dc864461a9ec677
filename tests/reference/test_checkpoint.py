"""The reference reads a checkpoint strictly: what it would compute wrongly is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from molmo_edge.errors import ModelError
from molmo_edge.reference.molmo import ReferenceMolmo
from tests.reference import tiny_reference as tiny
from tests.reference.tiny_reference import Tensors

IDS = [tiny.BOS, 5, 6, 7]
BLOCK = "model.transformer.blocks.1."
VISION = "model.vision_backbone."


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return tiny.weights(tiny.CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_and_half_precision_are_the_same_checkpoint_in_float32(
    tmp_path: Path, tensors: Tensors, dtype: torch.dtype
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    rounded = {name: tensor.float() for name, tensor in stored.items()}
    three = ReferenceMolmo.load(tiny.write(tmp_path / "three", tiny.CONFIG, stored, shards=3))
    one = ReferenceMolmo.load(tiny.write(tmp_path / "one", tiny.CONFIG, rounded))
    assert three.logits(IDS).dtype == torch.float32
    assert torch.equal(three.logits(IDS), one.logits(IDS))


def test_null_means_as_many_as_the_heads_and_the_vocabulary(tmp_path: Path) -> None:
    stated = {**tiny.CONFIG, "num_key_value_heads": 4, "embedding_size": 200}
    null = {**tiny.CONFIG, "num_key_value_heads": None, "embedding_size": None}
    tensors = tiny.weights(stated)
    models = [
        ReferenceMolmo.load(tiny.write(tmp_path / str(i), config, tensors))
        for i, config in enumerate((stated, null))
    ]
    assert models[1].logits(IDS).shape == (4, 200)
    assert torch.equal(models[0].logits(IDS), models[1].logits(IDS))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.transformer.wte.new_embedding", None, "lacks 1"),
        (VISION + "image_vit.class_embedding", None, r"lacks \d+"),
        (VISION + "image_vit.transformer.resblocks.4.feed_forward.w1.weight", None, "lacks 1"),
        # Each of these would be ignored or misread.
        (BLOCK + "q_norm.weight", torch.ones(64), "has unknown 1"),
        (BLOCK + "attn_out.weight_scale", torch.ones(64), "has unknown 1"),
        (BLOCK + "attn_out.weight", torch.ones(64, 32), "wrong shapes in 1"),
    ],
)
def test_missing_unknown_and_misshapen_tensors_are_named(
    tmp_path: Path, tensors: Tensors, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    changed = {n: t for n, t in tensors.items() if n != name}
    if tensor is not None:
        changed[name] = tensor
    with pytest.raises(ModelError, match=f"{message} tensors, first '{name}'"):
        ReferenceMolmo.load(tiny.write(tmp_path, tiny.CONFIG, changed))


def test_broken_files_and_other_layouts_are_refused(tmp_path: Path, tensors: Tensors) -> None:
    directory = tiny.write(tmp_path, tiny.CONFIG, tensors)
    (directory / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        ReferenceMolmo.load(directory)
    (directory / "config.json").write_text('{"model_type": "molmo2"}')
    with pytest.raises(ModelError, match="'molmo2' is not Molmo 1"):
        ReferenceMolmo.load(directory)
