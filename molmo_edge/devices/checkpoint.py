"""The shape of a checkpoint folder, or of a model known by its hub name."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path

from molmo_edge.checkpoint_files import Tensor, read_config, tensors
from molmo_edge.devices.model_configs import KNOWN, from_config
from molmo_edge.devices.shapes import ModelShape
from molmo_edge.errors import ModelError

_FLOATS = ("F64", "F32", "F16", "BF16")


def model_shape(model: str | Path) -> ModelShape:
    """The shape of a checkpoint folder, or of a model known by its hub name.

    Raises:
        ModelError: neither a folder nor known, a broken header, or a layout not supported.
    """
    folder = Path(model)
    if folder.is_dir():
        shape = from_config(folder.name, read_config(folder))
        stored = tensors(folder)
        return from_headers(shape, stored) if stored else shape
    name = str(model)
    if name in KNOWN:
        return from_config(name, KNOWN[name])
    near = difflib.get_close_matches(name[:120], KNOWN, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ModelError(
        f"{name[:120]!r} is neither a model folder nor a model known by name: {hint}"
        f"known are {', '.join(KNOWN)}"
    )


def from_headers(shape: ModelShape, found: list[Tensor]) -> ModelShape:
    """The same shape with what is really in the files."""
    linears: dict[tuple[int, int], int] = {}
    counts = {"embedding": 0, "head": 0, "tower": 0, "other": 0}
    stored = 0
    for tensor in found:
        part = part_of(tensor.name)
        if part != "blocks":
            counts[part] += tensor.numel
            continue
        plain = tensor.dtype in _FLOATS and tensor.name.endswith((".weight", ".bias"))
        stored += 2 * tensor.numel if plain else tensor.nbytes
        if plain and len(tensor.shape) == 2:
            rows, cols = tensor.shape
            linears[rows, cols] = linears.get((rows, cols), 0) + 1
        else:
            counts["other"] += tensor.numel
    sized = replace(
        shape,
        embedding=counts["embedding"],
        head=counts["head"],
        tower=counts["tower"],
        measured=True,
    )
    if shape.stored is not None:
        # Packed matrices hide their shape; the configuration's stays, the bytes are the files'.
        return replace(sized, stored_blocks=stored)
    return replace(
        sized,
        linears=tuple((rows, cols, count) for (rows, cols), count in sorted(linears.items())),
        block_other=counts["other"],
    )


def part_of(tensor: str) -> str:
    """Part of the model a tensor belongs to: tower, blocks, embedding or head."""
    if re.search(r"vision_backbone|vision_tower|vision_model|multi_modal_projector", tensor):
        return "tower"
    if re.search(r"(^|\.)(blocks|layers)\.\d+\.", tensor):
        return "blocks"
    if re.search(r"(^|\.)(wte|embed_tokens)\.", tensor):
        return "embedding"
    return "head" if re.search(r"(^|\.)(ff_out|lm_head)\.", tensor) else "blocks"
