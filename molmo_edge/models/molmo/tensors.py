"""Names and shapes of all tensors of a Molmo 1 checkpoint, as on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT = "model.transformer."
BLOCKS = TEXT + "blocks."
VISION = "model.vision_backbone."
VIT = VISION + "image_vit."
VIT_BLOCKS = VIT + "transformer.resblocks."
POOL = VISION + "image_pooling_2d."
PROJECTOR = VISION + "image_projector."

NEW_TOKENS = 128  # rows of `new_embedding`, after the text vocabulary; config.json does not say
PATCH_VALUES = 14 * 14 * 3
POSITIONS = 577  # 24 × 24 patches and the class token


@dataclass(frozen=True)
class Tower:
    """Sizes of the vision tower, which config.json does not state: those of all released models."""

    width: int = 1024
    mlp: int = 4096
    blocks: int = 23
    pooled: int = 1024


def tensor_shapes(
    config: Mapping[str, Any], tower: Tower | None = None
) -> dict[str, tuple[int, ...]]:
    """Return name → shape for the sizes that a `config.json` gives."""
    tower = tower or Tower()
    width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    kv = int(config.get("num_key_value_heads") or heads) * (width // heads)
    both = int(config["intermediate_size"])  # gate and up together
    half = both // 2
    vocabulary = int(config.get("embedding_size") or config["vocab_size"])
    shapes: dict[str, tuple[int, ...]] = {
        TEXT + "wte.embedding": (vocabulary, width),
        TEXT + "wte.new_embedding": (NEW_TOKENS, width),
        TEXT + "ln_f.weight": (width,),
        TEXT + "ff_out.weight": (vocabulary, width),
        VIT + "class_embedding": (tower.width,),
        VIT + "positional_embedding": (POSITIONS, tower.width),
        VIT + "patch_embedding.weight": (tower.width, PATCH_VALUES),
        VISION + "pad_embed": (2, 2 * tower.width),
        PROJECTOR + "w1.weight": (half, tower.pooled),
        PROJECTOR + "w2.weight": (width, half),
        PROJECTOR + "w3.weight": (half, tower.pooled),
    }
    for i in range(layers):
        block = f"{BLOCKS}{i}."
        shapes |= {
            block + "att_proj.weight": (width + 2 * kv, width),
            block + "attn_out.weight": (width, width),
            block + "ff_proj.weight": (both, width),
            block + "ff_out.weight": (width, half),
            block + "attn_norm.weight": (width,),
            block + "ff_norm.weight": (width,),
        }
        if config.get("qkv_bias"):
            shapes[block + "att_proj.bias"] = (width + 2 * kv,)
        if config.get("attention_layer_norm"):
            shapes |= {block + "q_norm.weight": (width,), block + "k_norm.weight": (kv,)}
    biased = {POOL + name: (tower.pooled, 2 * tower.width) for name in ("wq", "wk", "wv")}
    biased[POOL + "wo"] = (tower.pooled, tower.pooled)
    norms = [VIT + "pre_ln"]
    for i in range(tower.blocks):
        block = f"{VIT_BLOCKS}{i}."
        for name in ("wq", "wk", "wv", "wo"):
            biased[f"{block}attention.{name}"] = (tower.width, tower.width)
        biased[block + "feed_forward.w1"] = (tower.mlp, tower.width)
        biased[block + "feed_forward.w2"] = (tower.width, tower.mlp)
        norms += [block + "attention_norm", block + "ffn_norm"]
    for name, shape in biased.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    for name in norms:
        shapes |= {name + ".weight": (tower.width,), name + ".bias": (tower.width,)}
    return shapes
