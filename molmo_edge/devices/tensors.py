"""Tensor inventories: names and shapes of all tensors of a Molmo 1 or Gemma 3 checkpoint."""

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
    """Return name → shape of a Molmo 1, as on the hub, for the sizes in its `config.json`."""
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


def gemma3_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name → shape of a Gemma 3, as on the hub; the LM head is tied to the embedding."""
    text, vision = gemma3_parts(config)
    width, mlp = int(text["hidden_size"]), int(text["intermediate_size"])
    # The 4B's file leaves out what is transformers' default.
    size = int(text.get("head_dim", 256))
    q, kv = (int(text.get(f"num_{kind}_heads", default)) * size
             for kind, default in (("attention", 8), ("key_value", 4)))  # fmt: skip
    top = "model." if vision is None else "language_model.model."
    shapes: dict[str, tuple[int, ...]] = {
        top + "embed_tokens.weight": (int(text.get("vocab_size", 262208)), width),
        top + "norm.weight": (width,),
    }
    for i in range(int(text["num_hidden_layers"])):
        block = f"{top}layers.{i}."
        shapes |= {
            block + "self_attn.q_proj.weight": (q, width),
            block + "self_attn.k_proj.weight": (kv, width),
            block + "self_attn.v_proj.weight": (kv, width),
            block + "self_attn.o_proj.weight": (width, q),
            block + "self_attn.q_norm.weight": (size,),
            block + "self_attn.k_norm.weight": (size,),
            block + "mlp.gate_proj.weight": (mlp, width),
            block + "mlp.up_proj.weight": (mlp, width),
            block + "mlp.down_proj.weight": (width, mlp),
        }
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{block}{place}_layernorm.weight"] = (width,)
    return shapes if vision is None else shapes | _siglip_shapes(vision, width)


def gemma3_parts(
    config: Mapping[str, Any],
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """The text and vision sizes; checkpoints without vision have the former at the top."""
    if config["model_type"] == "gemma3_text":
        return config, None
    return config["text_config"], config["vision_config"]


def _siglip_shapes(vision: Mapping[str, Any], hidden: int) -> dict[str, tuple[int, ...]]:
    width, mlp = int(vision["hidden_size"]), int(vision["intermediate_size"])
    patch = int(vision["patch_size"])
    positions = (int(vision["image_size"]) // patch) ** 2
    top = "vision_tower.vision_model."
    embeddings = top + "embeddings."
    shapes: dict[str, tuple[int, ...]] = {
        embeddings + "patch_embedding.weight": (width, 3, patch, patch),
        embeddings + "patch_embedding.bias": (width,),
        embeddings + "position_embedding.weight": (positions, width),
        "multi_modal_projector.mm_input_projection_weight": (width, hidden),
        "multi_modal_projector.mm_soft_emb_norm.weight": (width,),
    }
    biased: dict[str, tuple[int, ...]] = {top + "post_layernorm": (width,)}
    for i in range(int(vision["num_hidden_layers"])):
        block = f"{top}encoder.layers.{i}."
        biased |= {f"{block}self_attn.{n}": (width, width)
                   for n in ("q_proj", "k_proj", "v_proj", "out_proj")}  # fmt: skip
        biased |= {
            block + "mlp.fc1": (mlp, width),
            block + "mlp.fc2": (width, mlp),
            block + "layer_norm1": (width,),
            block + "layer_norm2": (width,),
        }
    for name, shape in biased.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    return shapes


def _molmo_config(
    hidden: int, both: int, heads: int, kv: int | None, layers: int, rows: int, olmo: bool = False
) -> dict[str, Any]:
    return {
        "model_type": "molmo",
        "hidden_size": hidden,
        "intermediate_size": both,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_hidden_layers": layers,
        "embedding_size": rows,
        "attention_layer_norm": olmo,
        "qkv_bias": not olmo,
    }


def _gemma3_config(
    hidden: int, mlp: int, heads: int, kv: int, dim: int, layers: int
) -> dict[str, Any]:
    return {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": dim,
            "num_hidden_layers": layers,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "image_size": 896,
            "patch_size": 14,
        },
    }


# The sizes of each hub repository's config.json.
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "allenai/Molmo-7B-D-0924": _molmo_config(3584, 37888, 28, 4, 28, 152064),
    "allenai/Molmo-7B-O-0924": _molmo_config(4096, 22016, 32, None, 32, 100352, olmo=True),
    "allenai/Molmo-72B-0924": _molmo_config(8192, 59136, 64, 8, 80, 152064),
    "google/gemma-3-4b-it": _gemma3_config(2560, 10240, 8, 4, 256, 34),
    "google/gemma-3-12b-it": _gemma3_config(3840, 15360, 16, 8, 256, 48),
    "google/gemma-3-27b-it": _gemma3_config(5376, 21504, 32, 16, 128, 62),
}
