"""A checkpoint's metadata is read; whatever is broken is a ModelError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.checkpoint_files import INDEX, check_weights, read_config, tensors, weight_files
from molmo_edge.errors import ModelError
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ("\xff", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"architectures": 5}', "must be a list"),
    ],
)
def test_broken_config(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def header(tensor: Any) -> bytes:
    raw = json.dumps({"t": tensor}).encode()
    return len(raw).to_bytes(8, "little") + raw


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (1 << 62).to_bytes(8, "little"),
        header({"dtype": "F32"}),
        header({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),  # cut off
    ],
)
def test_broken_headers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors' is not a complete safetensors"):
        tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../x.safetensors"}}, "not a safetensors file beside it"),
        ({"weight_map": {"a": "m-1.safetensors"}}, "lacks 1 of 1 weight files, first 'm-1"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"a": 1}}, "has no weight_map"),
    ],
)
def test_broken_index(tmp_path: Path, index: Any, message: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        check_weights(tmp_path)


def test_a_tensor_in_two_files_and_a_directory_without_weights(tmp_path: Path) -> None:
    assert tensors(tmp_path) == []
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        check_weights(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        write_sparse(tmp_path / name, {"lm_head.weight": ("BF16", (2, 2))})
    with pytest.raises(ModelError, match=r"'lm_head\.weight' is stored in both 'a\.saf"):
        tensors(tmp_path)
