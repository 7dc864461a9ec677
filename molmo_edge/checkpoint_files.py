"""What lies in a checkpoint, from the headers of its safetensors files alone; no weight is read.

A file starts with the header's length (8 bytes, little-endian) and the header, a JSON object of
tensor name to dtype, shape and byte range. This module knows no model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.errors import ModelError

_MAX_HEADER = 100 * 1000 * 1000  # the limit of the safetensors library
_MAX_JSON = 64 * 1024 * 1024
_INDEX = "model.safetensors.index.json"
_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor on disk: dtype by safetensors' name, shape, size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: missing, unreadable, too large or no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelError(f"{path.name} is larger than {_MAX_JSON >> 20} MiB; expected JSON")
        data = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise ModelError(f"{path.name} is missing from the model folder {path.parent}") from exc
    except OSError as exc:
        raise ModelError(f"{path.name} cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{path.name} is not valid JSON") from exc
    if not isinstance(data, dict):
        raise ModelError(f"{path.name} must hold a JSON object")
    return data


def read_headers(folder: Path) -> list[Tensor]:
    """Every tensor of a checkpoint; empty when the folder holds no safetensors file.

    Raises:
        ModelError: a file or the index is broken, a shard is missing, or a name is there twice.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for tensor in read_header(path):
            if tensor.name in tensors:
                raise ModelError(f"{path.name}: tensor {tensor.name} is also in another file")
            tensors[tensor.name] = tensor
    return list(tensors.values())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, where it has one.

    Raises:
        ModelError: the index is broken, or a shard is missing.
    """
    index = folder / _INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{_INDEX} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{_INDEX} names a shard that is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise ModelError(f"{name} is missing; {_INDEX} lists it, so download it again")
    return [folder / name for name in names]


def read_header(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file.

    Raises:
        ModelError: the file is cut off, its header is no header, or sizes contradict each other.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ModelError(f"{path.name} is no safetensors file or is cut off")
            raw = file.read(length)
    except OSError as exc:
        raise ModelError(f"{path.name} cannot be read: {exc.strerror}") from exc
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{path.name} has a header that is not JSON") from exc
    if not isinstance(header, dict):
        raise ModelError(f"{path.name} has a header that is no JSON object")
    header.pop("__metadata__", None)
    return [_tensor(path.name, name, entry, size - 8 - length) for name, entry in header.items()]


def _tensor(file: str, name: str, entry: Any, data: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        right = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)
    except (TypeError, KeyError, ValueError):
        right = False
    if not right:
        raise ModelError(f"{file}: the header's entry for tensor {name[:120]} is malformed")
    if end < begin:
        raise ModelError(f"{file}: tensor {name[:120]} ends before it begins")
    if end > data:
        raise ModelError(f"{file} is cut off: tensor {name[:120]} lies behind its end")
    tensor = Tensor(name, dtype, tuple(shape), end - begin)
    width = _BYTES.get(dtype)
    if width is not None and width * tensor.numel != tensor.nbytes:
        raise ModelError(f"{file}: tensor {name[:120]} has another size than its shape says")
    return tensor
