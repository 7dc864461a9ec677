"""A Molmo 1 checkpoint small enough for a unit test: the hub's names, sizes of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from molmo_edge.devices.tensors import Tower, tensor_shapes
from molmo_edge.models.molmo.prompts import ImageTokenIds
from molmo_edge.models.molmo.synthetic import hub_config, random_weights

IDS = ImageTokenIds(start=208, end=209, patch=210, col=211)
BOS = 1
TOWER = Tower(width=128, mlp=256, blocks=9, pooled=128)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 200,
    "embedding_size": 208,
    "rope_theta": 10000.0,
}
CONFIG = hub_config("7b-d", **SIZES)
CONFIG_O = hub_config("7b-o", **SIZES)

Tensors = dict[str, torch.Tensor]


def weights(config: dict[str, Any]) -> Tensors:
    make = random_weights(0)
    return {name: make(name, shape) for name, shape in tensor_shapes(config, TOWER).items()}


def write(directory: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
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
