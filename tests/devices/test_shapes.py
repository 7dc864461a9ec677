"""Shapes are right to the parameter, and a broken checkpoint is a ModelError, never a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.devices.shapes import model_shape, part_of, stored_precision
from molmo_edge.devices.tensors import KNOWN
from molmo_edge.errors import ModelError
from tests.sparse_checkpoint import write_sparse


def molmo_tensors(dtype: str = "F32") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names and shapes of Molmo-7B-D, as the hub has them."""
    d, mlp, rows, w = 3584, 18944, 152064, 1024
    shapes: dict[str, tuple[int, ...]] = {
        "model.transformer.wte.embedding": (rows, d),
        "model.transformer.wte.new_embedding": (128, d),
        "model.transformer.ln_f.weight": (d,),
        "model.transformer.ff_out.weight": (rows, d),
    }
    for i in range(28):
        block = f"model.transformer.blocks.{i}."
        shapes |= {
            f"{block}att_proj.weight": (d + 1024, d),
            f"{block}att_proj.bias": (d + 1024,),
            f"{block}attn_out.weight": (d, d),
            f"{block}ff_proj.weight": (2 * mlp, d),
            f"{block}ff_out.weight": (d, mlp),
            f"{block}attn_norm.weight": (d,),
            f"{block}ff_norm.weight": (d,),
        }
    vit = "model.vision_backbone.image_vit."
    shapes |= {
        f"{vit}class_embedding": (w,),
        f"{vit}positional_embedding": (577, w),
        f"{vit}patch_embedding.weight": (w, 588),
        f"{vit}pre_ln.weight": (w,),
        f"{vit}pre_ln.bias": (w,),
        "model.vision_backbone.pad_embed": (2, 2 * w),
        "model.vision_backbone.image_projector.w1.weight": (mlp, w),
        "model.vision_backbone.image_projector.w2.weight": (d, mlp),
        "model.vision_backbone.image_projector.w3.weight": (mlp, w),
    }
    layers = {"attention.w" + x: (w, w) for x in "qkvo"}
    layers |= {"feed_forward.w1": (4 * w, w), "feed_forward.w2": (w, 4 * w)}
    matrices = {
        f"{vit}transformer.resblocks.{i}.{name}": size
        for i in range(23)
        for name, size in layers.items()
    }
    pooling = "model.vision_backbone.image_pooling_2d.w"
    matrices |= {pooling + x: (w, 2 * w) for x in "qkv"} | {pooling + "o": (w, w)}
    for name, (out, inner) in matrices.items():
        shapes |= {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}
    for i in range(23):
        for norm in ("attention_norm", "ffn_norm"):
            for kind in ("weight", "bias"):
                shapes[f"{vit}transformer.resblocks.{i}.{norm}.{kind}"] = (w,)
    return {name: (dtype, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Molmo-7B-D as on the hub: float32, two shards and an index, no byte of data on disk."""
    folder = tmp_path_factory.mktemp("hub") / "Molmo-7B-D-0924"
    folder.mkdir()
    tensors = list(molmo_tensors().items())
    shards = {"model-00001-of-00002.safetensors": tensors[:100],
              "model-00002-of-00002.safetensors": tensors[100:]}  # fmt: skip
    weight_map: dict[str, str] = {}
    for file, part in shards.items():
        write_sparse(folder / file, dict(part))
        weight_map |= {name: file for name, _ in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(KNOWN["allenai/Molmo-7B-D-0924"]))
    return folder


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As the hub counts them from the files.
        ("allenai/Molmo-7B-D-0924", 8_021_025_280),
        ("google/gemma-3-4b-it", 4_300_079_472),
        ("google/gemma-3-12b-it", 12_187_325_040),
        ("google/gemma-3-27b-it", 27_432_406_640),
    ],
)
def test_known_models_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert model_shape(name).parameters == parameters


def test_headers_and_configuration_agree(hub_folder: Path) -> None:
    known, read = model_shape("allenai/Molmo-7B-D-0924"), model_shape(hub_folder)
    assert (read.measured, known.measured) == (True, False)
    for precision in ("bf16", "fp8", "w4a16", "nvfp4", "nf4"):
        assert read.weights(precision) == known.weights(precision)
    assert read.parameters == known.parameters
    assert read.flops_per_token(1000) == known.flops_per_token(1000)


def test_bytes_of_molmo_7b_d() -> None:
    shape = model_shape("allenai/Molmo-7B-D-0924")
    assert shape.kv_bytes(1, "bfloat16") == 57_344
    assert shape.kv_bytes(1, "fp8") == 28_672
    assert shape.kv_bytes(1, "fp8_per_token_head") == 28_672 + 28 * 2 * 4 * 4  # a float32 a head
    fp8 = shape.weights("fp8")
    assert fp8.blocks == pytest.approx(6.53e9, rel=1e-3)
    assert fp8.embedding + fp8.head == pytest.approx(2.18e9, rel=1e-3)
    assert fp8.tower == pytest.approx(0.81e9, rel=1e-3)
    assert fp8.total == fp8.embedding + fp8.blocks + fp8.head + fp8.tower
    assert shape.decode_bytes("fp8") == pytest.approx(7.62e9, rel=1e-3)
    assert 4.4e9 < shape.decode_bytes("w4a16") < shape.decode_bytes("nvfp4") < 4.8e9
    assert shape.bytes_by_precision().keys() == {"bf16", "fp8"}


def test_tied_head_is_counted_once_and_windows_bound_the_cache() -> None:
    gemma = model_shape("google/gemma-3-27b-it")
    weights = gemma.weights("bf16")
    assert weights.head == 0
    assert gemma.decode_bytes("bf16") == weights.blocks + weights.embedding
    assert (gemma.layers, gemma.sliding_layers, gemma.sliding_window) == (62, 52, 1024)
    layer = gemma.kv_bytes(1, "bfloat16") // 62
    assert gemma.kv_bytes(4096, "bfloat16") == layer * (52 * 1024 + 10 * 4096)


def test_quantised_checkpoint_has_one_precision_and_the_files_bytes(tmp_path: Path) -> None:
    tensors = molmo_tensors("BF16")
    packed: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, size) in tensors.items():
        if ".blocks." in name and name.endswith(".weight") and len(size) == 2:
            stem, (rows, cols) = name.removesuffix(".weight"), size
            packed[f"{stem}.weight_packed"] = ("I32", (rows, cols // 8))
            packed[f"{stem}.weight_scale"] = ("BF16", (rows, cols // 128))
            packed[f"{stem}.weight_shape"] = ("I64", (2,))
        else:
            packed[name] = (dtype, size)
    write_sparse(tmp_path / "model.safetensors", packed)
    config = dict(KNOWN["allenai/Molmo-7B-D-0924"])
    weights = {"num_bits": 4, "type": "int", "group_size": 128}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = model_shape(tmp_path)
    expected = model_shape("allenai/Molmo-7B-D-0924").weights("w4a16")
    assert shape.precisions == ("w4a16",)
    shapes_of_matrices = 28 * 4 * 16
    assert shape.weights("w4a16").blocks == expected.blocks + shapes_of_matrices
    assert shape.bytes_by_precision() == {"w4a16": expected.total + shapes_of_matrices}


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        (None, None),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "w4a16"),
        ({"quant_method": "gptq", "bits": 8}, "w8a16"),
        ({"quant_method": "awq", "w_bit": 4}, "w4a16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({}, "unknown"),
    ],
)
def test_precision_of_a_quantised_checkpoint(config: Any, precision: str | None) -> None:
    assert stored_precision({"quantization_config": config}) == precision
    assert stored_precision({"text_config": {"quantization_config": config}}) == precision


def test_quantised_with_a_method_only_the_files_can_size(tmp_path: Path) -> None:
    config = dict(KNOWN["allenai/Molmo-7B-D-0924"])
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="as bitsandbytes is not known without its safetensors"):
        model_shape(tmp_path).weights("bitsandbytes")


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.transformer.blocks.3.ff_out.weight", "blocks"),
        ("model.transformer.ff_out.weight", "head"),
        ("model.vision_backbone.image_vit.transformer.resblocks.0.attention.wq.weight", "tower"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "tower"),
        ("multi_modal_projector.mm_input_projection_weight", "tower"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "blocks"),
        ("language_model.model.embed_tokens.weight", "embedding"),
        ("model.language_model.norm.weight", "blocks"),
        ("lm_head.weight", "head"),
    ],
)
def test_parts_by_the_hubs_tensor_names(tensor: str, part: str) -> None:
    assert part_of(tensor) == part


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'allenai/Molmo-7B-D-0924'.*gemma-3-27b"):
        model_shape("allenai/Molmo-7B-D")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "llama"}', "model_type 'llama'; planning knows molmo or gemma3"),
        ('{"model_type": "molmo"}', "lacks a size or has a wrong one: num_attention_heads"),
        ('{"model_type": "gemma3", "text_config": 3, "vision_config": {}}', "lacks a size"),
    ],
)
def test_broken_configuration(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        model_shape(tmp_path)


def test_zero_heads_is_a_model_error(tmp_path: Path) -> None:
    config = dict(KNOWN["allenai/Molmo-7B-D-0924"]) | {"num_attention_heads": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="lacks a size or has a wrong one"):
        model_shape(tmp_path)


def test_a_configuration_alone_gives_the_shape(tmp_path: Path) -> None:
    config = dict(KNOWN["allenai/Molmo-7B-D-0924"]) | {
        "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 1024, "embedding_size": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = model_shape(tmp_path)
    assert not shape.measured
    assert shape.matrix_params == 2 * (512 * 256 + 256 * 256 + 1024 * 256 + 256 * 512)
    assert shape.embedding == (512 + 128) * 256
