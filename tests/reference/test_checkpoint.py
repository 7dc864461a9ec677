"""The reference reads a checkpoint strictly: what it would compute wrongly is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from molmo_edge.errors import ModelError
from molmo_edge.reference.molmo import ReferenceMolmo
from tests.reference import tiny_reference as tiny

IDS = [tiny.BOS, 5, 6, 7]
BLOCK = "model.transformer.blocks.1."
VISION = "model.vision_backbone."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return tiny.weights(tiny.CONFIG)


def load(directory: Path, config: dict[str, Any], tensors: Tensors) -> ReferenceMolmo:
    return ReferenceMolmo.load(tiny.write(directory, config, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_and_half_precision_are_the_same_checkpoint_in_float32(
    tmp_path: Path, tensors: Tensors, dtype: torch.dtype
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    rounded = {name: tensor.float() for name, tensor in stored.items()}
    three = ReferenceMolmo.load(tiny.write(tmp_path / "three", tiny.CONFIG, stored, shards=3))
    logits = three.logits(IDS)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, load(tmp_path / "one", tiny.CONFIG, rounded).logits(IDS))


def test_null_in_the_config_means_as_many_as_the_heads_and_the_vocabulary(tmp_path: Path) -> None:
    stated = tiny.config(num_key_value_heads=4, embedding_size=200)
    null = tiny.config(num_key_value_heads=None, embedding_size=None)
    tensors = tiny.weights(stated)
    logits = load(tmp_path / "null", null, tensors).logits(IDS)
    assert logits.shape == (4, 200)
    assert torch.equal(logits, load(tmp_path / "stated", stated, tensors).logits(IDS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "molmo2"}, "says model_type=.*7B-D, 7B-O or 72B"),
        ({"model_type": None}, "says model_type="),
        ({"layer_norm_type": "default"}, "says layer_norm_type="),
        ({"clip_qkv": 8.0}, "says clip_qkv="),
        ({"weight_tying": True}, "says weight_tying="),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "says rope_scaling="),
        ({"hidden_size": None}, "must give hidden_size as an integer"),
        ({"hidden_size": "64"}, "must give hidden_size as"),
        ({"num_hidden_layers": 0}, "must give num_hidden_layers as"),
        ({"num_attention_heads": True}, "must give num_attention_heads as"),
        ({"rope_theta": float("inf")}, "must give rope_theta as a number"),
        ({"layer_norm_eps": -1e-6}, "must give layer_norm_eps as"),
        ({"num_attention_heads": 3}, "does not fit together"),
        ({"num_key_value_heads": 3}, "does not fit together"),
        ({"intermediate_size": 97}, "does not fit together"),
    ],
)
def test_another_layout_or_unusable_sizes_are_refused(
    tmp_path: Path, tensors: Tensors, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(tmp_path, tiny.CONFIG | changes, tensors)


@pytest.mark.parametrize(
    "name",
    [
        "model.transformer.wte.new_embedding",
        BLOCK + "att_proj.bias",
        VISION + "image_vit.class_embedding",
        VISION + "image_vit.transformer.resblocks.4.feed_forward.w1.weight",
        VISION + "image_pooling_2d.wo.weight",
        VISION + "pad_embed",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, tensors: Tensors, name: str) -> None:
    rest = {n: t for n, t in tensors.items() if n != name}
    with pytest.raises(ModelError, match=f"lacks 1 tensors, first '{name}'"):
        load(tmp_path, tiny.CONFIG, rest)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (BLOCK + "ff_proj.bias", torch.ones(64), "has unknown 1 tensors, first"),
        (BLOCK + "q_norm.weight", torch.ones(64), "has unknown 1 tensors, first"),
        ("lm_head.weight", torch.ones(64), "has unknown 1 tensors, first"),
        (BLOCK + "attn_out.weight", torch.ones(64, 32), "wrong shapes in 1 tensors, first"),
        (BLOCK + "attn_out.weight", torch.ones(64, 64).to(torch.int8), "not quantised"),
        (BLOCK + "attn_out.weight", torch.ones(64, 64).to(torch.float8_e4m3fn), "not quantised"),
    ],
)
def test_a_tensor_that_would_be_ignored_or_misread_is_named(
    tmp_path: Path, tensors: Tensors, name: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path, tiny.CONFIG, tensors | {name: tensor})
    assert f"'{name}'" in str(caught.value)


def test_too_few_tower_blocks_are_refused(tmp_path: Path, tensors: Tensors) -> None:
    short = {n: t for n, t in tensors.items() if "resblocks.8." not in n}
    with pytest.raises(ModelError, match="8 blocks"):
        load(tmp_path, tiny.CONFIG, short)


def test_missing_and_broken_files_are_named(tmp_path: Path, tensors: Tensors) -> None:
    directory = tiny.write(tmp_path, tiny.CONFIG, tensors)
    file = directory / "model.safetensors"
    file.write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        ReferenceMolmo.load(directory)
    file.unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        ReferenceMolmo.load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        ReferenceMolmo.load(directory)
