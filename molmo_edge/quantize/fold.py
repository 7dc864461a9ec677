"""What a few pictures tell about a checkpoint's channels, and where that goes.

Each linear layer may have its columns scaled up where its inputs are loud, so that rounding hurts
those least. The inverse goes into what makes the inputs, and the model computes the same as before:

    att_proj, ff_proj   the norm before them (not where norms come after, as in Molmo-7B-O)
    attn_out            the value rows of att_proj; query heads that share them share the scale
    ff_out              the rows of ff_proj that are not the gate's

Knows tensors by their names on the hub, nothing about how scales are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

LAYERS = ("att_proj", "attn_out", "ff_proj", "ff_out")
NORMS = {"attn_norm.weight": "att_proj", "ff_norm.weight": "ff_proj"}


@dataclass(frozen=True)
class Heads:
    """How the attention's channels lie: (kv_heads, heads of each, size), flattened."""

    heads: int
    kv_heads: int
    size: int

    def shared(self, channels: torch.Tensor) -> torch.Tensor:
        """(heads * size,) per channel of attn_out to (kv_heads * size,): the mean of each value."""
        return channels.view(self.kv_heads, -1, self.size).mean(1).flatten()

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """(kv_heads * size,) to (heads * size,)."""
        each = values.view(self.kv_heads, 1, self.size)
        return each.expand(-1, self.heads // self.kv_heads, -1).flatten()


@dataclass(frozen=True)
class Calibration:
    """Of each quantised layer, by its name: one float32 value a column.

    Attributes:
        moments: mean square of its inputs.
        scales: what its columns are multiplied by; absent where nothing can take the inverse.
    """

    heads: Heads
    moments: Mapping[str, torch.Tensor]
    scales: Mapping[str, torch.Tensor]

    def apply(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor of the original as it is to be stored; others come back as they are."""
        block, _, tail = name.rpartition(".blocks.")
        number, _, part = tail.partition(".")
        if not block:
            return value
        start = f"{block}.blocks.{number}."
        if part in NORMS and (scale := self.scales.get(start + NORMS[part])) is not None:
            return value.float() / scale
        layer, _, kind = part.rpartition(".")
        if layer not in LAYERS:
            return value
        changed = value
        if kind == "weight" and (scale := self.scales.get(start + layer)) is not None:
            changed = changed.float() * scale
        if layer == "att_proj" and (scale := self.scales.get(start + "attn_out")) is not None:
            # One query head of those that share a value stands for all.
            values = scale.view(self.heads.kv_heads, -1, self.heads.size)[:, 0].flatten()
            changed = _divide(changed, values, len(changed) - len(values))
        if layer == "ff_proj" and (scale := self.scales.get(start + "ff_out")) is not None:
            changed = _divide(changed, scale, 0)
        return changed

    def importance(self, layer: str) -> torch.Tensor:
        """(columns,): mean square of what the stored columns are multiplied by."""
        moments = self.moments[layer]
        scale = self.scales.get(layer)
        return moments if scale is None else moments / scale.square()

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, as `load` reads them from a file."""
        moments = {f"moments {name}": value for name, value in self.moments.items()}
        return moments | {f"scales {name}": value for name, value in self.scales.items()}

    @classmethod
    def load(cls, path: Path, heads: Heads) -> Calibration:
        from safetensors.torch import load_file

        found: dict[str, dict[str, torch.Tensor]] = {"moments": {}, "scales": {}}
        for name, value in load_file(path).items():
            kind, _, layer = name.partition(" ")
            found[kind][layer] = value
        return cls(heads, found["moments"], found["scales"])


def _divide(value: torch.Tensor, scale: torch.Tensor, first: int) -> torch.Tensor:
    """Rows from `first` on, of a weight or a bias, by `scale`."""
    changed = value.float().clone()
    rows = changed[first : first + len(scale)]
    rows /= scale.view(-1, *[1] * (value.ndim - 1))
    return changed


def through_bfloat16(norm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale that makes ``norm / scale`` a bfloat16 value, nearest to the one given.

    The norm is stored so; what its rounding changes is then made up for in the layer's columns.
    """
    stored = (norm.float() / scale).bfloat16().float()
    usable = (stored != 0) & (norm != 0)
    return torch.where(usable, norm.float() / torch.where(usable, stored, 1.0), 1.0)
