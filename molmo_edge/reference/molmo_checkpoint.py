"""Reads a Molmo 1 checkpoint for the reference implementation, strictly: every tensor is checked.

A tensor that is missing, of another shape or unaccounted for would make it compute something other
than the checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from molmo_edge.checkpoint_files import read_json, weight_files
from molmo_edge.devices.tensors import POOL, VIT, VIT_BLOCKS, Tower, tensor_shapes
from molmo_edge.errors import ModelError

# config.json does not state these.
VIT_HEAD = 64  # head size of the vision tower and of the pooling
OLDEST_STATE = 9  # the features use the tower's hidden states -2 and -9

# What `config.json` may say where the reference implementation computes one thing only.
FIXED = {
    "model_type": "molmo",
    "layer_norm_type": "rms",
    "clip_qkv": None,
    "weight_tying": False,
    "rope_scaling": None,
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TextConfig:
    """The language model as `config.json` states it.

    `ff` counts both halves of `ff_proj`; `vocabulary` is the number of logits.
    """

    width: int
    ff: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rope_theta: float
    eps: float
    qkv_bias: bool
    qk_norm: bool
    norm_after: bool

    @property
    def head(self) -> int:
        return self.width // self.heads


def read_checkpoint(directory: Path) -> tuple[TextConfig, dict[str, torch.Tensor]]:
    """Return the configuration, and float32 tensors by their names on the hub.

    Raises ModelError when a file or tensor is missing, broken, of another shape, or of a layout
    that the reference implementation does not compute.
    """
    stated = read_json(directory / "config.json")
    config = text_config(stated)
    weights: dict[str, torch.Tensor] = {}
    files = weight_files(directory)
    if not files:
        raise ModelError(f"'{directory}' contains no *.safetensors. Finish the download.")
    for file in files:
        weights.update(_read_tensors(file))
    shapes = tensor_shapes(stated, _tower(weights))
    _refuse("lacks", sorted(shapes.keys() - weights.keys()))
    _refuse("has unknown", sorted(weights.keys() - shapes.keys()))
    _refuse("has wrong shapes in", sorted(n for n in shapes if weights[n].shape != shapes[n]))
    return config, weights


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Number of blocks whose tensors are named `prefix` + number."""
    tails = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return len({tail.split(".")[0] for tail in tails})


def _refuse(problem: str, names: list[str]) -> None:
    if names:
        raise ModelError(
            f"The checkpoint {problem} {len(names)} tensors, first '{names[0]}'. Expected is a "
            "dense, unquantised Molmo 1 with the hub's tensor names that matches its config.json."
        )


def text_config(config: Mapping[str, Any]) -> TextConfig:
    """Return the language model that a `config.json` describes. Raises ModelError."""
    for key, expected in FIXED.items():
        value = config.get(key, None if key == "model_type" else expected)
        if value != expected:
            raise ModelError(
                f"config.json says {key}={json.dumps(value)}; the reference implementation "
                f"computes only {json.dumps(expected)}. Use a dense Molmo 1: 7B-D, 7B-O or 72B."
            )

    def number(key: str, kind: type[int] | type[float], default: Any = None) -> Any:
        value = config.get(key) if config.get(key) is not None else default
        allowed = int if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < math.inf:
            what = "an integer" if kind is int else "a number"
            raise ModelError(f"config.json must give {key} as {what} above 0.")
        return kind(value)

    heads = number("num_attention_heads", int)
    text = TextConfig(
        width=number("hidden_size", int),
        ff=number("intermediate_size", int),
        layers=number("num_hidden_layers", int),
        heads=heads,
        kv_heads=number("num_key_value_heads", int, default=heads),
        vocabulary=number("embedding_size", int, default=config.get("vocab_size")),
        rope_theta=number("rope_theta", float),
        eps=number("layer_norm_eps", float),
        qkv_bias=bool(config.get("qkv_bias", False)),
        qk_norm=bool(config.get("attention_layer_norm", False)),
        norm_after=bool(config.get("norm_after", False)),
    )
    if text.width % (2 * heads) or heads % text.kv_heads or text.ff % 2:
        raise ModelError(
            "config.json does not fit together: hidden_size must be a multiple of twice "
            "num_attention_heads, num_attention_heads of num_key_value_heads, and "
            "intermediate_size must be even."
        )
    return text


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                tensor = opened.get_tensor(name)
                if tensor.dtype not in FLOATS:
                    raise ModelError(
                        f"'{name}' is stored as {str(tensor.dtype).removeprefix('torch.')}. The "
                        "reference implementation reads float32, bfloat16 and float16, not "
                        "quantised weights."
                    )
                tensors[name] = tensor.to(torch.float32)
    except (OSError, SafetensorError) as exc:
        raise ModelError(f"'{file}' is not a safetensors file. Download it again.") from exc
    return tensors


def _tower(weights: Mapping[str, torch.Tensor]) -> Tower:
    """Sizes of the vision tower, read from its own tensors."""

    def rows(name: str) -> int:
        if name not in weights or weights[name].ndim == 0:
            _refuse("lacks", [name])
        return int(weights[name].shape[0])

    tower = Tower(
        width=rows(VIT + "class_embedding"),
        mlp=rows(VIT_BLOCKS + "0.feed_forward.w1.weight"),
        blocks=count_blocks(weights, VIT_BLOCKS),
        pooled=rows(POOL + "wo.weight"),
    )
    if tower.width % VIT_HEAD or tower.pooled % VIT_HEAD or tower.blocks < OLDEST_STATE:
        raise ModelError(
            f"The vision tower has width {tower.width}, pooled width {tower.pooled} and "
            f"{tower.blocks} blocks; widths must be multiples of {VIT_HEAD} and at least "
            f"{OLDEST_STATE} blocks are used."
        )
    return tower
