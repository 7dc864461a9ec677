"""Reads a checkpoint for the reference implementation, strictly: every tensor is checked.

A tensor that is missing, of another shape or unaccounted for would make it compute something other
than the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from molmo_edge.checkpoint_files import check_tensors, check_weights, tensors, weight_files
from molmo_edge.devices.tensors import MOLMO_DEFAULTS, POOL, VIT, VIT_BLOCKS, Shapes, Tower
from molmo_edge.models.molmo.config import check_layout


@dataclass(frozen=True)
class TextConfig:
    """The language model as `config.json` states it."""

    layers: int
    heads: int
    kv_heads: int
    head: int
    rope_theta: float
    eps: float
    qk_norm: Literal["head", "whole"] | None
    norm_after: bool


def read_weights(directory: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Return float32 tensors by their names in the files, which must be those of ``shapes``.

    float32 tensors stay mapped to their file: do not rewrite it while they are in use. Raises
    ModelError.
    """
    check_weights(directory)
    check_tensors(tensors(directory), shapes)
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        weights |= {name: tensor.float() for name, tensor in load_file(file).items()}
    return weights


def text_config(config: Mapping[str, Any]) -> TextConfig:
    """Return the language model that a Molmo 1's `config.json` describes. Raises ModelError."""
    check_layout(config)
    config = {**MOLMO_DEFAULTS, **config}
    return TextConfig(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"] or config["num_attention_heads"],
        head=config["hidden_size"] // config["num_attention_heads"],
        rope_theta=float(config["rope_theta"]),
        eps=float(config["layer_norm_eps"]),
        qk_norm="whole" if config["attention_layer_norm"] else None,
        norm_after=bool(config["norm_after"]),
    )


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Number of blocks named `prefix` + number."""
    rest = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return len({name.split(".")[0] for name in rest})


def tower_of(shapes: Mapping[str, Sequence[int]]) -> Tower:
    """Sizes of the vision tower, read from its own tensors; the released ones' where they lack."""
    names = VIT + "class_embedding", VIT_BLOCKS + "0.feed_forward.w1.weight", POOL + "wo.weight"
    if any(not shapes.get(name) for name in names):
        return Tower()
    width, mlp, pooled = (shapes[name][0] for name in names)
    return Tower(width, mlp, count_blocks(shapes, VIT_BLOCKS), pooled)
