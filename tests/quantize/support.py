"""Tensors of small quantised checkpoints by name."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from molmo_edge.quantize.formats import DEFAULT_HEADS, FORMATS, HEADS, unpack


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def layer_of(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    """Stored parts of one layer without its bias."""
    start = layer + "."
    return {
        name.removeprefix(start): value
        for name, value in tensors.items()
        if name.startswith(start) and not name.endswith(".bias")
    }


def plain_tensors(directory: Path, scheme: str, head: str | None = None) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under the hub's names, by compressed-tensors' own code."""
    tensors = tensors_of(directory)
    for layer in [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]:
        parts = layer_of(tensors, layer)
        form = FORMATS[scheme] if ".blocks." in layer else HEADS[head or DEFAULT_HEADS[scheme]]
        assert form is not None
        for suffix in parts:
            del tensors[f"{layer}.{suffix}"]
        tensors[f"{layer}.weight"] = unpack(parts, form)
    return tensors
