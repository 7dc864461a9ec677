"""A Molmo 1 checkpoint small enough for a unit test: the hub's names, sizes of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from molmo_edge.devices.tensors import Tower, tensor_shapes
from molmo_edge.reference.molmo import SpecialTokens

IDS = SpecialTokens(start=208, end=209, patch=210, col=211)
BOS = 1
VIT_WIDTH, POOLED, VIT_MLP, VIT_BLOCKS = 128, 128, 256, 9

CONFIG: dict[str, Any] = {
    "model_type": "molmo",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "embedding_size": 208,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-6,
    "layer_norm_type": "rms",
    "max_position_embeddings": 4096,
    "qkv_bias": True,
    "attention_layer_norm": False,
    "norm_after": False,
    "clip_qkv": None,
    "weight_tying": False,
}
LAYOUT_O = {"qkv_bias": False, "attention_layer_norm": True, "norm_after": True}


def config(**changes: Any) -> dict[str, Any]:
    return CONFIG | changes


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded random tensors; norms near one, the rest scaled so that activations stay near one."""
    random = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(*shape, generator=random)
        if name.endswith(("norm.weight", "ln.weight", "ln_f.weight")):
            return values * 0.1 + 1.0
        if name.endswith(".bias"):
            return values * (0.5 if "att_proj" in name else 0.1)
        if name.endswith("transformer.ff_out.weight"):
            return values * 0.3
        return values * shape[-1] ** -0.5 if name.endswith(".weight") else values

    tower = Tower(VIT_WIDTH, VIT_MLP, VIT_BLOCKS, POOLED)
    return {name: draw(name, shape) for name, shape in tensor_shapes(config, tower).items()}


def write(
    directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1
) -> Path:
    """A checkpoint directory: one file, or several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = sorted(tensors)
    place = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        save_file({n: tensors[n] for n in names if place[n] == file}, directory / file)
    index = json.dumps({"metadata": {}, "weight_map": place})
    (directory / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return directory
