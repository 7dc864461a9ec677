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


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return tiny.weights(tiny.CONFIG)


def load(
    directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> ReferenceMolmo:
    return ReferenceMolmo.load(tiny.write(directory, config, tensors))


def test_shards_with_an_index_are_the_same_checkpoint(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    one = load(tmp_path / "one", tiny.CONFIG, tensors)
    three = ReferenceMolmo.load(tiny.write(tmp_path / "three", tiny.CONFIG, tensors, shards=3))
    assert torch.equal(one.logits(IDS), three.logits(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_in_float32(
    tmp_path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    half = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    rounded = {name: tensor.float() for name, tensor in half.items()}
    found = load(tmp_path / "half", tiny.CONFIG, half).logits(IDS)
    assert found.dtype == torch.float32
    assert torch.equal(found, load(tmp_path / "full", tiny.CONFIG, rounded).logits(IDS))


def test_null_in_the_config_means_as_many_as_the_heads_and_the_vocabulary(tmp_path: Path) -> None:
    spelled = tiny.config(num_key_value_heads=4, embedding_size=200)
    null = tiny.config(num_key_value_heads=None, embedding_size=None)
    tensors = tiny.weights(spelled)
    found = load(tmp_path / "null", null, tensors).logits(IDS)
    assert found.shape == (4, 200)
    assert torch.equal(found, load(tmp_path / "spelled", spelled, tensors).logits(IDS))


def test_the_number_of_tower_blocks_is_that_of_the_tensors(tmp_path: Path) -> None:
    short = {n: t for n, t in tiny.weights(tiny.CONFIG).items() if "resblocks.8." not in n}
    with pytest.raises(ModelError, match="8 blocks"):
        load(tmp_path, tiny.CONFIG, short)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "molmo2"),
        ("model_type", None),
        ("layer_norm_type", "default"),
        ("clip_qkv", 8.0),
        ("weight_tying", True),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_another_layout_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], key: str, value: Any
) -> None:
    with pytest.raises(ModelError, match=f"says {key}=.*7B-D, 7B-O or 72B"):
        load(tmp_path, tiny.config(**{key: value}), tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("num_hidden_layers", 0),
        ("num_attention_heads", True),
        ("rope_theta", float("inf")),
        ("layer_norm_eps", -1e-6),
    ],
)
def test_a_config_without_usable_numbers_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], key: str, value: Any
) -> None:
    with pytest.raises(ModelError, match=f"must give {key} as a"):
        load(tmp_path, tiny.CONFIG | {key: value}, tensors)


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 3}, {"num_key_value_heads": 3}, {"intermediate_size": 97}]
)
def test_a_config_whose_numbers_do_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], changes: dict[str, int]
) -> None:
    with pytest.raises(ModelError, match="does not fit together"):
        load(tmp_path, tiny.config(**changes), tensors)


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
def test_a_missing_tensor_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], name: str
) -> None:
    rest = {n: t for n, t in tensors.items() if n != name}
    with pytest.raises(ModelError, match=f"lacks 1 tensors, first '{name}'"):
        load(tmp_path, tiny.CONFIG, rest)


@pytest.mark.parametrize(
    "name", [BLOCK + "ff_proj.bias", BLOCK + "q_norm.weight", "lm_head.weight"]
)
def test_a_tensor_that_would_be_ignored_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], name: str
) -> None:
    with pytest.raises(ModelError, match=f"has unknown 1 tensors, first '{name}'"):
        load(tmp_path, tiny.CONFIG, tensors | {name: torch.ones(64)})


def test_a_tensor_of_another_shape_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    name = BLOCK + "attn_out.weight"
    with pytest.raises(ModelError, match=f"wrong shapes in 1 tensors, first '{name}'"):
        load(tmp_path, tiny.CONFIG, tensors | {name: torch.ones(64, 32)})


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    name = BLOCK + "attn_out.weight"
    with pytest.raises(ModelError, match="not quantised weights"):
        load(tmp_path, tiny.CONFIG, tensors | {name: tensors[name].to(dtype)})


def test_missing_and_broken_files_are_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        ReferenceMolmo.load(tmp_path / "nowhere")
    directory = tiny.write(tmp_path / "one", tiny.CONFIG, tensors)
    (directory / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        ReferenceMolmo.load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        ReferenceMolmo.load(directory)
    directory = tiny.write(tmp_path / "two", tiny.CONFIG, tensors, shards=2)
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1\.safetensors"):
        ReferenceMolmo.load(directory)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="weight_map"):
        ReferenceMolmo.load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match="JSON"):
        ReferenceMolmo.load(directory)
