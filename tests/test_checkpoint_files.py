"""A checkpoint's metadata is read; whatever is broken is a ModelError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.checkpoint_files import (
    INDEX,
    check_data_files,
    check_weights,
    read_config,
    tensors,
    weight_files,
)
from molmo_edge.devices.shapes import inventory
from molmo_edge.devices.tensors import KNOWN
from molmo_edge.errors import ModelError
from molmo_edge.models.molmo import synthetic as molmo
from molmo_edge.models.molmo2 import synthetic as molmo2
from molmo_edge.models.registry import family_of
from tests.sparse_checkpoint import write_sparse


def test_tensors_of_all_shards_with_dtype_shape_and_bytes(tmp_path: Path) -> None:
    write_sparse(tmp_path / "b.safetensors", {"x": ("F8_E4M3", (3, 5)), "s": ("I64", ())})
    write_sparse(tmp_path / "a.safetensors", {"y": ("BF16", (2, 2))})
    write_sparse(tmp_path / "extra.safetensors", {"z": ("F32", (1,))})
    weight_map = {"y": "a.safetensors", "x": "b.safetensors", "s": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    read = [(t.name, t.file.name, t.dtype, t.shape, t.nbytes) for t in tensors(tmp_path)]
    assert read == [
        ("y", "a.safetensors", "BF16", (2, 2), 8),
        ("s", "b.safetensors", "I64", (), 8),
        ("x", "b.safetensors", "F8_E4M3", (3, 5), 15),
    ]
    assert weight_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def header(tensor: Any) -> str:
    raw = json.dumps({"t": tensor})
    return len(raw).to_bytes(8, "little").decode("latin-1") + raw


def index(weight_map: Any) -> dict[str, str]:
    return {INDEX: json.dumps({"weight_map": weight_map})}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
TOKENIZER = '{"model": {"vocab": {"a": 0}}}'
WEIGHTS = "model.safetensors"
NOT_COMPLETE = r"model\.safetensors' is not a complete safetensors"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": None}, "is missing"),
        ({"config.json": "\xff"}, "not valid JSON"),
        # Which transformers does not read either.
        ({"config.json": "\xef\xbb\xbf{}"}, "without a byte order mark"),
        ({"config.json": "[" * 100_000}, "not valid JSON"),
        ({"config.json": "[]"}, "must hold a JSON object"),
        ({"config.json": '{"architectures": 5}'}, "must be a list"),
        ({WEIGHTS: ""}, NOT_COMPLETE),
        ({WEIGHTS: (1 << 62).to_bytes(8, "little").decode("latin-1")}, NOT_COMPLETE),
        ({WEIGHTS: header({"dtype": "F32"})}, NOT_COMPLETE),
        ({WEIGHTS: header({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})}, NOT_COMPLETE),
        (index({"a": "../../x.safetensors"}), "not a safetensors file beside it"),
        (index({"a": "m-1.safetensors"}), "lacks 1 of 1 weight files, first 'm-1"),
        (index({"a": "x" * 300 + ".safetensors"}), "lacks 1 of 1 weight files"),
        (index({}), "has no weight_map"),
        (index({"a": 1}), "has no weight_map"),
        # Directories that are something else, with the way out.
        ({"config.json": None, "snapshots/0a/config.json": "{}"}, "below: give '.*snapshots/0a'"),
        ({"config.json": None, "molmo/config.json": "{}"}, "below: give '.*molmo'"),
        ({"config.json": None, "models--allenai--x/refs/main": "0a"}, "root of a Hugging Face"),
        ({"config.json": None, "adapter_config.json": "{}"}, "LoRA adapters: merge"),
        ({"config.json": None, "model-q4.gguf": ""}, "gguf files are not read"),
        ({WEIGHTS: None, "pytorch_model.bin": ""}, "bin files are not read"),
        ({WEIGHTS: POINTER}, "Git LFS pointer.*git lfs pull"),
        # Without a tokenizer, or with a broken data file.
        ({"tokenizer.json": None}, r"no tokenizer \(tokenizer\.json\)"),
        ({"tokenizer.json": None, "vocab.json": "{}"}, "no tokenizer"),
        ({"tokenizer.json": POINTER}, "Git LFS pointer"),
        ({"tokenizer.json": None, "tokenizer.model": POINTER}, "Git LFS pointer"),
        ({"tokenizer.json": '{"cut": '}, "not valid JSON"),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json without a vocabulary"),
        ({"tokenizer_config.json": "\xef\xbb\xbf{}"}, "tokenizer_config.json' .*byte order mark"),
        ({"generation_config.json": "{"}, "generation_config.json' is not valid JSON"),
        ({"preprocessor_config.json": "->"}, "preprocessor_config.json' is a symbolic link to a"),
    ],
)
def test_what_is_wrong_with_a_directory_is_named(
    tmp_path: Path, files: dict[str, str | None], message: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    write_sparse(tmp_path / WEIGHTS, {"x": ("BF16", (2, 2))})
    for name, content in files.items():
        path = tmp_path / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "->":
            path.symlink_to("nothing")
        elif content is not None:
            path.write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)
        check_weights(tmp_path)
        tensors(tmp_path)
        check_data_files(tmp_path)


def test_a_tensor_in_two_files_and_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "._a.safetensors").write_text("of macOS")
    assert tensors(tmp_path) == []
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        check_weights(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        write_sparse(tmp_path / name, {"lm_head.weight": ("BF16", (2, 2))})
    with pytest.raises(ModelError, match=r"'lm_head\.weight' is stored in both 'a\.saf"):
        tensors(tmp_path)


CONFIGS: dict[str, dict[str, Any]] = {
    "7b-d": molmo.hub_config(),
    "7b-o": molmo.hub_config("7b-o"),
    "molmo2": molmo2.hub_config(),
    "gemma3": dict(KNOWN["google/gemma-3-4b-it"]),
}
BLOCK = "model.transformer.blocks.1."
VISION = "model.vision_backbone."
HEAD = "model.transformer.ff_out"
QUANTISED = {"quantization_config": {"quant_method": "compressed-tensors"}}
Stored = dict[str, tuple[str, tuple[int, ...]]]


def check(directory: Path, config: dict[str, Any], stored: Stored, load: str = "auto") -> None:
    """Check a directory of these tensors as every start of an engine does."""
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(TOKENIZER)
    (directory / "notes.json").write_text("[]")  # which no engine reads
    write_sparse(directory / "model.safetensors", stored)
    family_of(config).check(config, directory, load)


def complete(config: dict[str, Any]) -> Stored:
    return {name: ("BF16", shape) for name, shape in inventory(config).items()}


def quantised(scheme: str) -> Stored:
    """A 7B-D as compressed-tensors stores it."""
    stored = complete(CONFIGS["7b-d"])
    for name, (_, shape) in list(stored.items()):
        if ".blocks." in name and len(shape) == 2:
            layer, (rows, cols) = name.removesuffix("weight"), stored.pop(name)[1]
            if scheme == "fp8":
                stored[layer + "weight"] = ("F8_E4M3", (rows, cols))
            else:
                stored[layer + "weight_packed"] = ("I32", (rows, cols // 8))
            stored[layer + "weight_scale"] = ("BF16", (rows, 1))
            if scheme == "nvfp4":
                stored[layer + "weight_packed"] = ("U8", (rows, cols // 2))
                stored[layer + "weight_global_scale"] = ("F32", (1,))
    return stored


@pytest.mark.parametrize("name", CONFIGS)
def test_complete_checkpoints_of_every_family_are_accepted(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    check(tmp_path, config, complete(config))
    for scheme in ("fp8", "w4a16", "nvfp4") if name == "7b-d" else ():
        check(tmp_path, config | QUANTISED, quantised(scheme))
    if name == "7b-d":  # an FP8 weight without its scale would be read as bfloat16
        fp8 = {n: one for n, one in quantised("fp8").items() if not n.endswith("_scale")}
        with pytest.raises(ModelError, match="no quantization_config, but quantised 8 tensors"):
            check(tmp_path, config, fp8)
    if name == "gemma3":  # as transformers 4 and 5 name them
        for tower in ("model.vision_tower.", "vision_tower.vision_model."):
            stored = {
                f"model.language_model.{n}".replace("model.language_model.vision_tower.", tower): t
                for n, t in complete(config).items()
            }
            check(tmp_path, config, stored | {"lm_head.weight": ("BF16", (262208, 2560))})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("7b-d", HEAD + ".weight"),
        ("7b-d", BLOCK + "att_proj.bias"),
        ("7b-o", BLOCK + "k_norm.weight"),
        ("7b-d", VISION + "image_projector.w3.weight"),
        ("7b-d", VISION + "image_vit.transformer.resblocks.22.attention.wv.weight"),
        ("molmo2", "lm_head.weight"),
        ("molmo2", BLOCK + "mlp.ff_proj.weight"),
        ("molmo2", VISION + "image_pooling_2d.wo.bias"),
        ("gemma3", "vision_tower.encoder.layers.3.mlp.fc1.bias"),
    ],
)
def test_a_missing_and_a_misshapen_tensor_are_named(tmp_path: Path, name: str, tensor: str) -> None:
    stored = complete(CONFIGS[name])
    shape = stored[tensor][1]
    with pytest.raises(ModelError, match=rf"wrong shapes in 1 tensors, first '{tensor}' \(7,\) in"):
        check(tmp_path, CONFIGS[name], stored | {tensor: ("BF16", (7,))})
    with pytest.raises(ModelError, match=r"unknown 1 tensors, first .extra\.weight"):
        check(tmp_path, CONFIGS[name], stored | {"extra.weight": ("BF16", shape)})
    del stored[tensor]
    with pytest.raises(ModelError, match=f"lacks 1 tensors, first '{tensor}'"):
        check(tmp_path, CONFIGS[name], stored)
    check(tmp_path, CONFIGS[name], stored, "dummy")


@pytest.mark.parametrize(
    ("scheme", "missing", "extra", "message"),
    [
        ("fp8", BLOCK + "ff_out.weight_scale", {}, f"lacks 1 .* '{BLOCK}ff_out.weight_"),
        ("w4a16", BLOCK + "ff_out.weight_packed", {}, f"lacks 1 .* '{BLOCK}ff_out.weight'"),
        ("nvfp4", BLOCK + "ff_out.weight_global_scale", {}, "lacks 1 .* 'model.*global_scale'"),
        ("fp8", HEAD + ".weight", {HEAD + ".weight": ("F8_E4M3", (512, 256))}, "not supported"),
        ("fp8", None, {BLOCK + "att_proj.lora_A.weight": ("BF16", (8, 256))}, "merge_and_unload"),
    ],
)
def test_a_quantised_checkpoint_has_every_scale_and_a_plain_head(
    tmp_path: Path, scheme: str, missing: str | None, extra: Stored, message: str
) -> None:
    stored = {name: one for name, one in quantised(scheme).items() if name != missing}
    with pytest.raises(ModelError, match=message):
        check(tmp_path, CONFIGS["7b-d"] | QUANTISED, stored | extra)


def test_a_quantised_head_is_accepted_where_the_configuration_says_so(tmp_path: Path) -> None:
    form, ignored = {"format": "float-quantized", "targets": ["Linear"]}, ["lm_head", "re:.*vision"]
    quant = QUANTISED["quantization_config"] | {"config_groups": {"a": form}, "ignore": ignored}
    config = CONFIGS["7b-d"] | {"quantization_config": quant}
    plain = quantised("fp8")
    shape = plain[HEAD + ".weight"][1]
    scale = {HEAD + ".weight_scale": ("F32", (shape[0], 1))}
    check(tmp_path, config, plain | {HEAD + ".weight": ("F8_E4M3", shape)} | scale)
    for wrong in (("F8_E4M3", (shape[0] - 5, shape[1])), ("U8", shape)):
        with pytest.raises(ModelError, match="is no part of a fp8 LM head"):
            check(tmp_path, config, plain | {HEAD + ".weight": wrong} | scale)
    with pytest.raises(ModelError, match="says that the LM head is quantised, and it is not"):
        check(tmp_path, config, plain)
    quant["config_groups"] = {"a": form | {"format": "int-quantized"}}
    with pytest.raises(ModelError, match="not supported: the LM head can be fp8, w8a16"):
        check(tmp_path, config, plain | {HEAD + ".weight": ("U8", shape)} | scale)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "molmo", "text_config": {}}, "transformers' own Molmo"),
        (molmo2.hub_config(vision_config={}), "transformers' own Molmo 2"),
        (molmo2.hub_config(image_patch_id=640), "image_patch_id among the 640 tokens"),
        (molmo2.hub_config(image_col_id=-1), "image_col_id among"),
        (molmo2.hub_config(image_end_token_id=None), "image_end_token_id among"),
    ],
)
def test_configurations_that_would_be_computed_wrongly(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        family_of(config).check(config, tmp_path, "auto")


@pytest.mark.parametrize("crops", [4, 0, "12", None])
def test_max_crops_is_the_checkpoints_own(tmp_path: Path, crops: object) -> None:
    config = CONFIGS["7b-d"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_crops": crops}))
    if crops == 4:
        assert family_of(config).default_crops(tmp_path) == 4
    else:
        with pytest.raises(ModelError, match="max_crops must be 1 to"):
            check(tmp_path, config, complete(config))
