"""Read a checkpoint's metadata: config.json, the shard index and safetensors headers.

No weight is read and torch is not imported. This module knows no model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.errors import ModelError

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that are not quantised."""


@dataclass(frozen=True)
class Tensor:
    """One stored tensor; ``dtype`` is safetensors' name, such as ``"BF16"`` or ``"F8_E4M3"``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        # The name starts with a letter or two and the bits: BF16, F8_E4M3, U32.
        bits = 8 if self.dtype == "BOOL" else int(self.dtype.split("_")[0].lstrip("BFIUC"))
        return self.numel * bits // 8


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ModelError(
            f"'{path}' is missing. A checkpoint directory holds config.json, the tokenizer's files "
            "and *.safetensors."
        ) from None
    except OSError as exc:
        raise ModelError(f"'{path}' cannot be read: {exc.strerror}.") from exc
    except (ValueError, RecursionError) as exc:
        raise ModelError(
            f"'{path}' is not valid JSON in UTF-8 without a byte order mark ({exc}). Download it "
            "again."
        ) from exc
    if not isinstance(value, dict):
        raise ModelError(f"'{path}' must hold a JSON object.")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint directory; see `read_json` for errors."""
    config = read_json(directory / "config.json")
    if not isinstance(config.get("architectures") or [], list):
        raise ModelError("config.json is broken: architectures must be a list of names.")
    return config


def weight_files(directory: Path) -> list[Path]:
    """Safetensors files of a checkpoint, in order: those its index names, if it has one.

    Raises:
        ModelError: the index is broken, names another kind of file, or files are missing.
    """
    index = directory / INDEX
    if not index.is_file():
        return sorted(directory.glob("*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(name, str) for name in files):
        raise ModelError(f"'{index}' has no weight_map from tensor names to file names.")
    names = sorted(set(files))
    if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise ModelError(f"'{index}' names a file that is not a safetensors file beside it.")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"'{directory}' lacks {len(missing)} of {len(names)} weight files, first "
            f"'{missing[0]}'. Finish the download."
        )
    return [directory / name for name in names]


def check_weights(directory: Path) -> None:
    """Raise ModelError unless the directory holds every weight file that it should."""
    if not weight_files(directory):
        raise ModelError(f"'{directory}' holds no *.safetensors weights. Finish the download.")


def tensors(directory: Path) -> list[Tensor]:
    """Every tensor of a checkpoint; empty when the directory holds no safetensors file.

    Raises:
        ModelError: a file is broken or missing, or a tensor is stored twice.
    """
    by_name: dict[str, Tensor] = {}
    for path in weight_files(directory):
        for tensor in _read_header(path):
            if tensor.name in by_name:
                first = by_name[tensor.name].file.name
                raise ModelError(f"'{tensor.name}' is stored in both '{first}' and '{path.name}'.")
            by_name[tensor.name] = tensor
    return list(by_name.values())


def _read_header(path: Path) -> list[Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            parts = [(name, file.get_slice(name)) for name in sorted(file.keys())]
            return [Tensor(name, path, p.get_dtype(), tuple(p.get_shape())) for name, p in parts]
    except (OSError, SafetensorError) as exc:
        raise ModelError(
            f"'{path}' is not a complete safetensors file ({exc}). Download it again."
        ) from exc
