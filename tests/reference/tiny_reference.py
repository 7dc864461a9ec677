"""A Molmo 1 checkpoint small enough for a unit test: the hub's names, sizes of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

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

    def draw(*shape: int, scale: float | None = None, around: float = 0.0) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if scale is None else scale
        return torch.randn(*shape, generator=random) * scale + around

    d, half = config["hidden_size"], config["intermediate_size"] // 2
    rows = config["embedding_size"] or config["vocab_size"]
    heads = config["num_attention_heads"]
    kv = (config["num_key_value_heads"] or heads) * (d // heads)
    out = {
        "wte.embedding": draw(rows, d, scale=1.0),
        "wte.new_embedding": draw(128, d, scale=1.0),
        "ln_f.weight": draw(d, scale=0.1, around=1.0),
        "ff_out.weight": draw(rows, d, scale=0.3),
    }
    for i in range(config["num_hidden_layers"]):
        block = {
            "att_proj.weight": draw(d + 2 * kv, d),
            "attn_out.weight": draw(d, d),
            "ff_proj.weight": draw(2 * half, d),
            "ff_out.weight": draw(d, half),
            "attn_norm.weight": draw(d, scale=0.1, around=1.0),
            "ff_norm.weight": draw(d, scale=0.1, around=1.0),
        }
        if config["qkv_bias"]:
            block["att_proj.bias"] = draw(d + 2 * kv, scale=0.5)
        if config["attention_layer_norm"]:
            block["q_norm.weight"] = draw(d, scale=0.1, around=1.0)
            block["k_norm.weight"] = draw(kv, scale=0.1, around=1.0)
        out |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    out = {f"model.transformer.{name}": tensor for name, tensor in out.items()}

    v = VIT_WIDTH
    vision = {
        "image_vit.class_embedding": draw(v, scale=1.0),
        "image_vit.positional_embedding": draw(577, v, scale=1.0),
        "image_vit.patch_embedding.weight": draw(v, 588),
        "pad_embed": draw(2, 2 * v, scale=1.0),
        "image_projector.w1.weight": draw(half, POOLED),
        "image_projector.w3.weight": draw(half, POOLED),
        "image_projector.w2.weight": draw(d, half),
    }
    linears = {f"image_pooling_2d.{name}": (POOLED, 2 * v) for name in ("wq", "wk", "wv")}
    linears["image_pooling_2d.wo"] = (POOLED, POOLED)
    norms = ["image_vit.pre_ln"]
    for i in range(VIT_BLOCKS):
        block_name = f"image_vit.transformer.resblocks.{i}"
        linears |= {f"{block_name}.attention.{n}": (v, v) for n in ("wq", "wk", "wv", "wo")}
        linears[f"{block_name}.feed_forward.w1"] = (VIT_MLP, v)
        linears[f"{block_name}.feed_forward.w2"] = (v, VIT_MLP)
        norms += [f"{block_name}.attention_norm", f"{block_name}.ffn_norm"]
    for name, shape in linears.items():
        vision |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0], scale=0.1)}
    for name in norms:
        vision[f"{name}.weight"] = draw(v, scale=0.1, around=1.0)
        vision[f"{name}.bias"] = draw(v, scale=0.1)
    return out | {f"model.vision_backbone.{name}": tensor for name, tensor in vision.items()}


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1
) -> Path:
    """A checkpoint folder: one file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    place = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        save_file({n: tensors[n] for n in names if place[n] == file}, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": place})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder
