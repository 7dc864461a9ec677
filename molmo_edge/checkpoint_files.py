"""Read and check a checkpoint's metadata: config.json, the shard index and safetensors headers.

No weight is read and torch is not imported. This module knows no model.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from molmo_edge.errors import ModelError
from molmo_edge.files import file_mode

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that are not quantised."""

_LFS_POINTER = b"version https://git-lfs"
# Beside config.json, what transformers and vLLM read if it is there.
_JSON_FILES = (
    INDEX, "added_tokens.json", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json",
)  # fmt: skip
# How a quantised layer's values are stored, and beside each what vLLM cannot do without; any of
# several names.
_PACKED: Mapping[str, tuple[str, ...]] = {
    "weight": ("weight_scale", "weight_scale_inv", "weight.absmax", "SCB"),
    "weight_packed": ("weight_scale",),
    "qweight": ("scales",),
}


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


_PROCESSOR_FILES = {
    "image": "preprocessor_config.json",
    "video": "video_preprocessor_config.json",
}


def processor_settings(directory: Path, kind: Literal["image", "video"] | None = None) -> Any:
    """Return what a checkpoint says about its images, its videos or, without a kind, its prompts.

    The file of each kind comes first; transformers 5 saves all in processor_config.json. Empty if
    there is none. Raises ModelError for a broken file.
    """
    path = directory / _PROCESSOR_FILES[kind] if kind else directory / "processor_config.json"
    if path.is_file():
        return read_json(path)
    inner = processor_settings(directory).get(f"{kind}_processor") if kind else None
    return inner if isinstance(inner, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        if path.is_symlink():
            raise ModelError(
                f"'{path}' is a symbolic link to a file that is missing. Download it again."
            ) from None
        raise ModelError(
            f"'{path}' is missing. A checkpoint directory holds config.json, the tokenizer's files "
            f"and *.safetensors.{_what_it_is(path.parent)}"
        ) from None
    except OSError as exc:
        raise ModelError(f"'{path}' cannot be read: {exc.strerror}.") from exc
    except (ValueError, RecursionError) as exc:
        _refuse_pointer(path)
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
        # Not the hidden files that macOS writes beside others.
        return sorted(directory.glob("[!.]*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(name, str) for name in files):
        raise ModelError(f"'{index}' has no weight_map from tensor names to file names.")
    names = sorted(set(files))
    if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise ModelError(f"'{index}' names a file that is not a safetensors file beside it.")
    missing = [name for name in names if not stat.S_ISREG(file_mode(directory / name))]
    if missing:
        raise ModelError(
            f"'{directory}' lacks {len(missing)} of {len(names)} weight files, first "
            f"'{missing[0]}'. Finish the download."
        )
    return [directory / name for name in names]


def check_weights(directory: Path) -> None:
    """Raise ModelError unless the directory holds every weight file that it should."""
    if not weight_files(directory):
        raise ModelError(
            f"'{directory}' holds no *.safetensors weights."
            f"{_what_it_is(directory) or ' Finish the download; other formats are not read.'}"
        )


def check_data_files(directory: Path) -> None:
    """Raise ModelError unless the JSON files are whole, and a tokenizer is among the files."""
    # A link to nothing is no absent file.
    there = [name for name in _JSON_FILES if os.path.lexists(directory / name)]
    read = {name: read_json(directory / name) for name in there}
    found, problem = "tokenizer.json" in read, "has no tokenizer (tokenizer.json)"
    if found:
        model = read["tokenizer.json"].get("model")
        found = isinstance(model, dict) and bool(model.get("vocab"))
        problem = "has a tokenizer.json without a vocabulary"
    elif (directory / "tokenizer.model").is_file():
        _refuse_pointer(directory / "tokenizer.model")
        found = True
    elif (directory / "merges.txt").is_file() and (directory / "vocab.json").is_file():
        found = bool(read_json(directory / "vocab.json"))
    if not found:
        raise ModelError(
            f"'{directory}' {problem}. Copy it from the original checkpoint, or download it again."
        )


def check_tensors(
    stored: Iterable[Tensor], shapes: Mapping[str, tuple[int, ...]], *, quantised: bool = False
) -> None:
    """Raise ModelError unless the tensors are those of ``shapes``, each with all of its parts.

    vLLM starts without them, and computes with whatever its memory holds.
    """
    by_name = {tensor.name: tensor for tensor in stored}
    if adapters := [name for name in by_name if "lora_" in name or ".base_layer." in name]:
        raise ModelError(
            f"The checkpoint has LoRA adapters in it, first '{adapters[0]}'. Merge them into the "
            "weights (PEFT's merge_and_unload), and save the result."
        )
    plain = {name: tensor for name, tensor in by_name.items() if tensor.dtype in FLOATS}
    if not quantised:
        _refuse("has unknown", by_name.keys() - shapes.keys())
        # Without its scale an FP8 weight would be read as if it were bfloat16.
        _refuse("has no quantization_config, but quantised", by_name.keys() - plain.keys())
    missing = [part for name in shapes if name not in plain for part in _missing(name, by_name)]
    _refuse("lacks", missing)
    wrong = [
        f"{name}' {plain[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if name in plain and plain[name].shape != shape
    ]
    _refuse("has wrong shapes in", wrong)


def _missing(name: str, stored: Mapping[str, Tensor]) -> list[str]:
    """What a tensor that is not stored as it is lacks; nothing if it is quantised."""
    layer = name.removesuffix(".weight")
    for values, scales in _PACKED.items():
        packed = stored.get(f"{layer}.{values}")
        if packed is not None and layer != name:
            needed = [next((one for one in scales if f"{layer}.{one}" in stored), scales[0])]
            if values == "weight_packed" and packed.dtype == "U8":  # NVFP4
                needed.append("weight_global_scale")
            return [f"{layer}.{one}" for one in needed if f"{layer}.{one}" not in stored]
    return [name]


def _refuse(problem: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        first = names[0] if "'" in names[0] else f"{names[0]}'"
        raise ModelError(
            f"The checkpoint {problem} {len(names)} tensors, first '{first}. Finish the download; "
            "a model saved by other code must have the hub's tensor names and fit its config.json."
        )


def _refuse_pointer(path: Path) -> None:
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(
                f"'{path}' is a Git LFS pointer, not the file itself. Run `git lfs install` and "
                "`git lfs pull` in its directory, or download it with `hf download`."
            )


def _what_it_is(directory: Path) -> str:
    """A sentence on what a directory is that is no checkpoint; empty if nobody knows."""
    # A Hugging Face cache's snapshots, or directories of the user's own.
    inner = [*directory.glob("snapshots/*/config.json"), *directory.glob("*/config.json")]
    if inner:
        newest = max(inner, key=lambda file: file.parent.stat().st_mtime)
        return f" The checkpoint is in a directory below: give '{newest.parent}'."
    if any(directory.glob("models--*")):
        return " This is the root of a Hugging Face cache; give a hub name, or a snapshot in it."
    if (directory / "adapter_config.json").is_file():
        return (
            " These are LoRA adapters: merge them into their base model (PEFT's merge_and_unload), "
            "and save the result."
        )
    others = {file.suffix for file in directory.glob("*.*")} & {".gguf", ".bin", ".pt"}
    if not others:
        return ""
    return (
        f" Its {', '.join(sorted(others))} files are not read: download the model's *.safetensors, "
        "or save it with save_pretrained(safe_serialization=True)."
    )


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
        _refuse_pointer(path)
        raise ModelError(
            f"'{path}' is not a complete safetensors file ({exc}). Download it again."
        ) from exc
