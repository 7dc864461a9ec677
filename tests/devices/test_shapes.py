"""Shapes are right to the parameter, and a broken checkpoint is a ModelError, never a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.devices.shapes import HEADS, model_shape, stored_head, stored_precision
from molmo_edge.devices.tensors import KNOWN, molmo2_tensor_shapes, tensor_shapes
from molmo_edge.errors import ModelError
from tests.sparse_checkpoint import write_sparse

NAME = "allenai/Molmo-7B-D-0924"
CONFIG = dict(KNOWN[NAME])
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def checkpoint(directory: Path, **config: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    return directory


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


def test_float32_files_and_the_configuration_agree(tmp_path: Path) -> None:
    stored = {name: ("F32", shape) for name, shape in tensor_shapes(CONFIG).items()}
    write_sparse(tmp_path / "model.safetensors", stored)
    known, read = model_shape(NAME), model_shape(checkpoint(tmp_path))
    assert (read.measured, known.measured) == (True, False)
    assert read.block_bytes == known.block_bytes
    assert read.parameters == known.parameters


def test_bytes_of_molmo_7b_d() -> None:
    shape = model_shape(NAME)
    assert shape.kv_bytes(1, "bfloat16") == shape.kv_bytes(1, "auto") == 57_344
    assert shape.kv_bytes(1, "fp8") == 28_672
    # A float32 for each head and token.
    assert shape.kv_bytes(1, "fp8_per_token_head") == 28_672 + 28 * 2 * 4 * 4
    fp8, blocks = shape.weight_bytes("fp8"), shape.block_bytes["fp8"]
    assert blocks == pytest.approx(6.53e9, rel=1e-3)
    assert fp8 - blocks == pytest.approx(2.99e9, rel=1e-3)  # embeddings, head and tower
    assert shape.decode_bytes("fp8") == pytest.approx(7.62e9, rel=1e-3)
    assert 4.4e9 < shape.decode_bytes("w4a16") < shape.decode_bytes("nvfp4") < 4.8e9
    assert shape.bytes_by_precision() == {"bf16": 2 * shape.parameters, "fp8": fp8}
    assert shape.bytes_by_precision(float32=True) == {
        "bf16": 4 * shape.parameters, "fp8": 2 * fp8 - blocks,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tensors", "parameters", "tower", "kv_bytes", "longest"),
    [
        # The first two as in the hub's index.
        ("Molmo2-4B", 706, 4_850_869_200, 439.1e6, 147_456, 36_864),
        ("Molmo2-ER", 706, 4_850_869_200, 439.1e6, 147_456, 36_864),
        ("Molmo2-8B", 706, 8_661_703_120, 470.4e6, 147_456, 36_864),
        ("Molmo2-O-7B", 674, 7_760_786_896, 462.3e6, 524_288, 65_536),
    ],
)
def test_molmo_2(
    name: str, tensors: int, parameters: int, tower: float, kv_bytes: int, longest: int
) -> None:
    assert len(molmo2_tensor_shapes(KNOWN[f"allenai/{name}"])) == tensors
    shape = model_shape(f"allenai/{name}")
    assert (shape.parameters, shape.kv_bytes(1, "auto")) == (parameters, kv_bytes)
    assert (shape.max_model_len, shape.qwen2) == (longest, False)
    assert shape.tower == pytest.approx(tower, rel=1e-3)


def test_tied_head_is_counted_once_and_windows_bound_the_cache() -> None:
    gemma = model_shape("google/gemma-3-27b-it")
    assert gemma.head == 0
    assert gemma.decode_bytes("bf16") == gemma.block_bytes["bf16"] + 2 * gemma.embedding
    assert (gemma.layers, gemma.sliding_layers, gemma.sliding_window) == (62, 52, 1024)
    layer = gemma.kv_bytes(1, "bfloat16") // 62
    assert gemma.kv_bytes(4096, "bfloat16") == layer * (52 * 1024 + 10 * 4096)


def test_a_quantised_head_has_fewer_bytes() -> None:
    shape = model_shape("allenai/Molmo-7B-D-0924")
    plain = shape.decode_bytes("w4a16")
    saved = {name: plain - shape.with_head(name).decode_bytes("w4a16") for name in HEADS}
    rows = 152064
    assert saved["none"] == 0
    assert saved["fp8"] == rows * (3584 - 4)
    assert saved["w8a16"] == rows * (3584 - 2 * 28)
    assert saved["w4a16"] == rows * (3 * 3584 // 2 - 2 * 28)
    assert plain - saved["fp8"] == shape.with_head("fp8").decode_bytes("w4a16")
    for model, head, message in (
        ("allenai/Molmo2-4B", "int3", "expected none, fp8, w8a16, w4a16"),
        ("google/gemma-3-4b-it", "fp8", "is its embedding"),
    ):
        with pytest.raises(ModelError, match=message):
            model_shape(model).with_head(head)


@pytest.mark.parametrize(
    ("ignore", "targets", "head"),
    [
        ([], ["Linear"], "fp8"),
        (["lm_head"], ["Linear"], "fp8"),  # vLLM's name of it, not the checkpoint's
        (["model.transformer.ff_out"], ["Linear"], None),
        ([r"re:.*\.ff_out$"], ["Linear"], None),
        ([], [r"re:.*blocks\.\d+"], None),
    ],
)
def test_targets_and_ignored_layers_say_whether_the_head_is_quantised(
    ignore: list[str], targets: list[str], head: str | None
) -> None:
    quant = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": targets}},
        "ignore": ignore,
    }
    assert stored_head({"model_type": "molmo", "quantization_config": quant}) == head


def test_quantised_checkpoint_has_one_precision_and_the_files_bytes(tmp_path: Path) -> None:
    packed: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, size in tensor_shapes(CONFIG).items():
        if ".blocks." in name and name.endswith(".weight") and len(size) == 2:
            stem, (rows, cols) = name.removesuffix(".weight"), size
            packed[f"{stem}.weight_packed"] = ("I32", (rows, cols // 8))
            packed[f"{stem}.weight_scale"] = ("BF16", (rows, cols // 128))
            packed[f"{stem}.weight_shape"] = ("I64", (2,))
        else:
            packed[name] = ("BF16", size)
    write_sparse(tmp_path / "model.safetensors", packed)
    quant = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
    }
    shape = model_shape(checkpoint(tmp_path, quantization_config=quant))
    expected = model_shape(NAME).weight_bytes("w4a16")
    shapes_of_matrices = 28 * 4 * 16
    assert shape.precisions == ("w4a16",)
    assert shape.bytes_by_precision() == {"w4a16": expected + shapes_of_matrices}


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        (None, None),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({}, "unknown"),
    ],
)
def test_precision_of_a_quantised_checkpoint(config: Any, precision: str | None) -> None:
    assert stored_precision({"quantization_config": config}) == precision
    assert stored_precision({"text_config": {"quantization_config": config}}) == precision


def test_quantised_with_a_method_only_the_files_can_size(tmp_path: Path) -> None:
    shape = model_shape(checkpoint(tmp_path, quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.raises(ModelError, match="as bitsandbytes is not known without its safetensors"):
        shape.bytes_by_precision()


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"Did you mean allenai/Molmo-7B-D-0924.*gemma-3-27b"):
        model_shape("allenai/Molmo-7B-D")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; planning knows molmo, molmo2 and gemma3"),
        ({"model_type": "molmo"}, "lacks a size or has a wrong one: hidden_size"),
        ({"model_type": "gemma3", "text_config": 3, "vision_config": {}}, "lacks a size"),
        (CONFIG | {"num_attention_heads": 0}, "lacks a size or has a wrong one"),
        *((CONFIG | {"quantization_config": quant}, "broken quantization_config") for quant in (
            [1], "fp8", PACKED, PACKED | {"config_groups": {}},
            PACKED | {"config_groups": {"group_0": {"weights": None}}},
            PACKED | {"config_groups": {"group_0": {"weights": {"num_bits": None}}}},
            PACKED | {"config_groups": {"group_0": {"weights": {"num_bits": float("inf")}}}},
        )),
    ],
)  # fmt: skip
def test_broken_configuration(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        model_shape(tmp_path)
    if "quantization_config" in config:  # which every start reads for itself
        with pytest.raises(ModelError, match=message):
            stored_precision(config)
