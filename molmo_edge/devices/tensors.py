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


# Of the config.json of Molmo-7B-D-0924; `intermediate_size` counts both halves of `ff_proj`.
MOLMO_DEFAULTS: Mapping[str, Any] = {
    "attention_layer_norm": False,
    "clip_qkv": None,
    "embedding_size": None,
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 37888,
    "layer_norm_eps": 1e-6,
    "layer_norm_type": "rms",
    "max_position_embeddings": 4096,
    "norm_after": False,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": None,
    "qkv_bias": True,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_position_ids": True,
    "vocab_size": 152064,
    "weight_tying": False,
}
# Of the config.json of Molmo2-4B.
VIT_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "image_default_input_size": [378, 378],
    "image_patch_size": 14,
    "image_num_pos": 729,
}
ADAPTER_DEFAULTS: Mapping[str, Any] = {
    "vit_layers": [-3, -9],
    "pooling_attention_mask": True,
    "hidden_size": 1152,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "hidden_act": "silu",
    "intermediate_size": 9728,
    "text_hidden_size": 2560,
}
TEXT_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "additional_vocab_size": 128,
    "qkv_bias": False,
    "num_hidden_layers": 36,
    "intermediate_size": 9728,
    "hidden_act": "silu",
    "max_position_embeddings": 36864,
    "rope_theta": 5_000_000.0,
    "rope_scaling": None,
    "rope_scaling_layers": None,
    "use_qk_norm": True,
    "qk_norm_type": "qwen3",
    "layer_norm_eps": 1e-6,
    "norm_after": False,
}
# What Molmo-7B-O and Molmo2-O-7B have beside other sizes.
MOLMO_O: Mapping[str, Any] = {
    "attention_layer_norm": True,
    "norm_after": True,
    "qkv_bias": False,
    "rope_theta": 500_000.0,
}
MOLMO2_O: Mapping[str, Any] = {
    "max_position_embeddings": 65536,
    "norm_after": True,
    "qk_norm_type": "olmo",
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500_000.0,
}


def _molmo(**sizes: Any) -> dict[str, Any]:
    return {**MOLMO_DEFAULTS, "model_type": "molmo", **sizes}


def _molmo2(**text: Any) -> dict[str, Any]:
    text = {**TEXT_DEFAULTS, **text}
    adapter = {
        "intermediate_size": text["intermediate_size"],
        "text_hidden_size": text["hidden_size"],
    }
    return {
        "model_type": "molmo2",
        "text_config": text,
        "vit_config": VIT_DEFAULTS,
        "adapter_config": {**ADAPTER_DEFAULTS, **adapter},
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
    vision = {
        key: VIT_DEFAULTS[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    }
    vision |= {"image_size": 896, "patch_size": 14}
    return {"model_type": "gemma3", "text_config": text, "vision_config": vision}


# The config.json of each hub repository, as far as models here depend on it.
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "allenai/Molmo-7B-D-0924": _molmo(embedding_size=152064, num_key_value_heads=4),
    "allenai/Molmo-7B-O-0924": _molmo(
        hidden_size=4096, intermediate_size=22016, num_attention_heads=32, num_hidden_layers=32,
        embedding_size=100352, **MOLMO_O,
    ),
    "allenai/Molmo-72B-0924": _molmo(
        hidden_size=8192, intermediate_size=59136, num_attention_heads=64, num_hidden_layers=80,
        num_key_value_heads=8, embedding_size=152064,
    ),
    "allenai/Molmo2-4B": _molmo2(),
    "allenai/Molmo2-8B": _molmo2(hidden_size=4096, intermediate_size=12288, rope_theta=1_000_000.0),
    "allenai/Molmo2-O-7B": _molmo2(
        hidden_size=4096, intermediate_size=11008, num_key_value_heads=32, num_hidden_layers=32,
        vocab_size=100278, rope_scaling_layers=[*range(3, 32, 4)], **MOLMO2_O,
    ),
    "allenai/Molmo2-ER": _molmo2(),
    "allenai/Molmo2-VideoPoint-4B": _molmo2(),
    "google/gemma-3-4b-it": _gemma3(2560, 10240, 8, 4, 256, 34),
    "google/gemma-3-12b-it": _gemma3(3840, 15360, 16, 8, 256, 48),
    "google/gemma-3-27b-it": _gemma3(5376, 21504, 32, 16, 128, 62),
}  # fmt: skip
