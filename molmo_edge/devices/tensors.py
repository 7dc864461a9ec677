"""Tensor inventories of Molmo 1 and 2 and Gemma 3; sizes of published models."""

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


Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: Mapping[str, Any], tower: Tower | None = None) -> Shapes:
    """Return name → shape of a Molmo 1, as on the hub, for the sizes in its `config.json`."""
    tower = tower or Tower()
    width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    kv = int(config.get("num_key_value_heads") or heads) * (width // heads)
    both = int(config["intermediate_size"])  # gate and up together
    half = both // 2
    vocabulary = int(config.get("embedding_size") or config["vocab_size"])
    block: Shapes = {
        "att_proj.weight": (width + 2 * kv, width),
        "attn_out.weight": (width, width),
        "ff_proj.weight": (both, width),
        "ff_out.weight": (width, half),
        "attn_norm.weight": (width,),
        "ff_norm.weight": (width,),
    }
    if config.get("qkv_bias"):
        block["att_proj.bias"] = (width + 2 * kv,)
    if config.get("attention_layer_norm"):
        block |= {"q_norm.weight": (width,), "k_norm.weight": (kv,)}
    vit = tower.width
    return {
        TEXT + "wte.embedding": (vocabulary, width),
        TEXT + "wte.new_embedding": (NEW_TOKENS, width),
        TEXT + "ln_f.weight": (width,),
        TEXT + "ff_out.weight": (vocabulary, width),
        **_repeat(BLOCKS, layers, block),
        VIT + "class_embedding": (vit,),
        VIT + "positional_embedding": (POSITIONS, vit),
        VIT + "patch_embedding.weight": (vit, PATCH_VALUES),
        **_biased({VIT + "pre_ln": (vit,)}),
        VISION + "pad_embed": (2, 2 * vit),
        **_vision(tower, 2 * vit, half, width),
    }


def molmo2_tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return name → shape of a Molmo 2, as on the hub, for the sizes in its `config.json`."""
    vision, adapter, text = config["vit_config"], config["adapter_config"], config["text_config"]
    width, mlp = int(text["hidden_size"]), int(text["intermediate_size"])
    size = int(text["head_dim"])
    q, kv = int(text["num_attention_heads"]) * size, int(text["num_key_value_heads"]) * size
    per_head = text["qk_norm_type"] == "qwen3"
    block: Shapes = {
        "attn_norm.weight": (width,),
        "ff_norm.weight": (width,),
        "self_attn.att_proj.weight": (q + 2 * kv, width),  # queries, keys, values
        "self_attn.attn_out.weight": (width, q),
        "self_attn.q_norm.weight": (size if per_head else q,),
        "self_attn.k_norm.weight": (size if per_head else kv,),
        "mlp.ff_proj.weight": (2 * mlp, width),  # up, gate
        "mlp.ff_out.weight": (width, mlp),
    }
    declared, used = int(vision["num_hidden_layers"]), adapter["vit_layers"]
    tower = Tower(
        width=int(vision["hidden_size"]),
        mlp=int(vision["intermediate_size"]),
        # Blocks after the last one that is read are not in the files.
        blocks=1 + max(layer % declared for layer in used),
        pooled=int(adapter["hidden_size"]),
    )
    patch = int(vision["image_patch_size"])
    return {
        TEXT + "wte.embedding": (int(text["vocab_size"]), width),
        TEXT + "wte.new_embedding": (int(text["additional_vocab_size"]), width),
        TEXT + "ln_f.weight": (width,),
        "lm_head.weight": (int(text["vocab_size"]), width),
        **_repeat(BLOCKS, int(text["num_hidden_layers"]), block),
        VIT + "positional_embedding": (int(vision["image_num_pos"]), tower.width),
        **_biased({VIT + "patch_embedding": (tower.width, patch * patch * 3)}),
        **_vision(tower, len(used) * tower.width, int(adapter["intermediate_size"]), width),
    }


def _vision(tower: Tower, features: int, mlp: int, hidden: int) -> Shapes:
    """Blocks, pooling of ``features`` values per patch, and projector to ``hidden``."""
    vit, pooled = tower.width, tower.pooled
    block: Shapes = {
        **{f"attention.{name}": (vit, vit) for name in ("wq", "wk", "wv", "wo")},
        "feed_forward.w1": (tower.mlp, vit),
        "feed_forward.w2": (vit, tower.mlp),
        "attention_norm": (vit,),
        "ffn_norm": (vit,),
    }
    return {
        **_repeat(VIT_BLOCKS, tower.blocks, _biased(block)),
        **_biased({POOL + name: (pooled, features) for name in ("wq", "wk", "wv")}),
        **_biased({POOL + "wo": (pooled, pooled)}),
        PROJECTOR + "w1.weight": (mlp, pooled),
        PROJECTOR + "w2.weight": (hidden, mlp),
        PROJECTOR + "w3.weight": (mlp, pooled),
    }


def gemma3_tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return name → shape of a Gemma 3, by `gemma3_name`; its LM head is the embedding."""
    text, vision = config["text_config"], config["vision_config"]
    width, mlp = int(text["hidden_size"]), int(text["intermediate_size"])
    # The 4B's file leaves out what is transformers' default.
    size = int(text.get("head_dim", 256))
    q = int(text.get("num_attention_heads", 8)) * size
    kv = int(text.get("num_key_value_heads", 4)) * size
    block: Shapes = {
        **{f"self_attn.{name}_norm.weight": (size,) for name in "qk"},
        **{f"self_attn.{name}_proj.weight": (kv, width) for name in "kv"},
        "self_attn.q_proj.weight": (q, width),
        "self_attn.o_proj.weight": (width, q),
        **{f"mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")},
        "mlp.down_proj.weight": (width, mlp),
        **{
            f"{name}_layernorm.weight": (width,)
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        },
    }
    vit, vit_mlp = int(vision["hidden_size"]), int(vision["intermediate_size"])
    patch = int(vision["patch_size"])
    patches = (int(vision["image_size"]) // patch) ** 2
    vit_block: Shapes = {
        **{f"self_attn.{name}_proj": (vit, vit) for name in ("q", "k", "v", "out")},
        "mlp.fc1": (vit_mlp, vit),
        "mlp.fc2": (vit, vit_mlp),
        "layer_norm1": (vit,),
        "layer_norm2": (vit,),
    }
    tower, vit_layers = "vision_tower.", int(vision["num_hidden_layers"])
    return {
        "embed_tokens.weight": (int(text.get("vocab_size", 262208)), width),
        **_repeat("layers.", int(text["num_hidden_layers"]), block),
        "norm.weight": (width,),
        **_biased({tower + "embeddings.patch_embedding": (vit, 3, patch, patch)}),
        tower + "embeddings.position_embedding.weight": (patches, vit),
        **_repeat(tower + "encoder.layers.", vit_layers, _biased(vit_block)),
        **_biased({tower + "post_layernorm": (vit,)}),
        "multi_modal_projector.mm_input_projection_weight": (vit, width),
        "multi_modal_projector.mm_soft_emb_norm.weight": (vit,),
    }


def gemma3_name(name: str) -> str:
    """A tensor's name without the levels that differ between versions of transformers."""
    levels = ("model", "language_model", "vision_model")
    return ".".join(part for part in name.split(".") if part not in levels)


def _repeat(prefix: str, count: int, block: Shapes) -> Shapes:
    return {f"{prefix}{i}.{name}": shape for i in range(count) for name, shape in block.items()}


def _biased(layers: Shapes) -> Shapes:
    """Weight and bias of each layer."""
    return {
        f"{name}.{kind}": shape if kind == "weight" else shape[:1]
        for name, shape in layers.items()
        for kind in ("weight", "bias")
    }


def _molmo(
    hidden: int, both: int, heads: int, kv: int | None, layers: int, rows: int, qwen2: bool = True
) -> dict[str, Any]:
    return {
        "model_type": "molmo",
        "hidden_size": hidden,
        "intermediate_size": both,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_hidden_layers": layers,
        "embedding_size": rows,
        "attention_layer_norm": not qwen2,
        "qkv_bias": qwen2,
    }


def _gemma3(hidden: int, mlp: int, heads: int, kv: int, dim: int, layers: int) -> dict[str, Any]:
    text = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "num_hidden_layers": layers,
    }
    return {"model_type": "gemma3", "text_config": text, "vision_config": _SIGLIP}


def _molmo2(
    hidden: int, mlp: int, layers: int, theta: float, *, olmo: bool = False
) -> dict[str, Any]:
    text = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32 if olmo else 8,
        "head_dim": 128,
        "vocab_size": 100278 if olmo else 151936,
        "additional_vocab_size": NEW_TOKENS,
        "max_position_embeddings": 65536 if olmo else 36864,
        "rope_theta": theta,
        "qk_norm_type": "olmo" if olmo else "qwen3",
        "norm_after": olmo,
    }
    vit = {
        **_SIGLIP_BLOCKS,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "image_patch_size": 14,
        "image_num_pos": 729,
    }
    adapter = {"vit_layers": [-3, -9], "hidden_size": 1152, "intermediate_size": mlp}
    return {
        "model_type": "molmo2",
        "text_config": text,
        "vit_config": vit,
        "adapter_config": adapter,
    }


_SIGLIP_BLOCKS = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
_SIGLIP = {**_SIGLIP_BLOCKS, "image_size": 896, "patch_size": 14}
_MOLMO2_4B = _molmo2(2560, 9728, 36, 5_000_000.0)

# The sizes of each hub repository's config.json.
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "allenai/Molmo-7B-D-0924": _molmo(3584, 37888, 28, 4, 28, 152064),
    "allenai/Molmo-7B-O-0924": _molmo(4096, 22016, 32, None, 32, 100352, qwen2=False),
    "allenai/Molmo-72B-0924": _molmo(8192, 59136, 64, 8, 80, 152064),
    "allenai/Molmo2-4B": _MOLMO2_4B,
    "allenai/Molmo2-8B": _molmo2(4096, 12288, 36, 1_000_000.0),
    "allenai/Molmo2-O-7B": _molmo2(4096, 11008, 32, 500_000.0, olmo=True),
    "allenai/Molmo2-ER": _MOLMO2_4B,
    "allenai/Molmo2-VideoPoint-4B": _MOLMO2_4B,
    "google/gemma-3-4b-it": _gemma3(2560, 10240, 8, 4, 256, 34),
    "google/gemma-3-12b-it": _gemma3(3840, 15360, 16, 8, 256, 48),
    "google/gemma-3-27b-it": _gemma3(5376, 21504, 32, 16, 128, 62),
}
