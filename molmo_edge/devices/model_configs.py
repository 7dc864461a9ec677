"""Model shapes from a ``config.json``: Molmo 1 and Gemma 3, and the hub's models by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from molmo_edge.devices.quantized import stored_precision
from molmo_edge.devices.shapes import ModelShape
from molmo_edge.errors import ModelError


def from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a ``config.json`` describes.

    Raises:
        ModelError: ``model_type`` is unknown here, or a size is missing or wrong.
    """
    family = config.get("model_type")
    try:
        if family == "molmo":
            shape = _molmo(name, config)
        elif family in ("gemma3", "gemma3_text"):
            shape = _gemma3(name, config)
        else:
            known = "molmo or gemma3, with vision or without"
            raise ModelError(f"config.json has model_type {family!r}; planning knows {known}")
    except (KeyError, TypeError, ZeroDivisionError, ValueError) as exc:
        missing = f": {exc.args[0]}" if isinstance(exc, KeyError) else ""
        raise ModelError(f"config.json lacks a size or has a wrong one{missing}") from exc
    return replace(shape, stored=stored_precision(config))


def _molmo(name: str, config: Mapping[str, Any]) -> ModelShape:
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    both = int(config["intermediate_size"])  # of ff_proj: gate and up together
    rows = int(config.get("embedding_size") or config["vocab_size"])
    head_dim = hidden // heads
    qkv = hidden + 2 * kv_heads * head_dim
    bias = bool(config.get("qkv_bias", True))
    norms = 2 * hidden + (hidden + kv_heads * head_dim) * bool(config.get("attention_layer_norm"))
    mlp = both // 2
    # CLIP ViT-L/14-336 (23 blocks, 577 positions), pooling, projector and padding embeddings.
    block = 4 * (1024 * 1024 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024
    vit = 23 * block + 1024 + 577 * 1024 + 588 * 1024 + 2 * 1024
    pooling = 3 * (2048 * 1024 + 1024) + 1024 * 1024 + 1024
    projector = 2 * 1024 * mlp + mlp * hidden + 2 * 2048
    return ModelShape(
        name=name,
        family="molmo",
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=int(config.get("max_position_embeddings", 4096)),
        linears=(
            (qkv, hidden, layers),
            (hidden, hidden, layers),
            (both, hidden, layers),
            (hidden, mlp, layers),
        ),
        block_other=layers * (norms + qkv * bias) + hidden,
        embedding=(rows + 128) * hidden,  # 128 rows for the image tokens
        head=rows * hidden,
        tower=vit + pooling + projector,
        qwen2=bias,
    )


def _gemma3(name: str, config: Mapping[str, Any]) -> ModelShape:
    # Checkpoints without vision have the sizes at the top.
    vision = None if config["model_type"] == "gemma3_text" else config["vision_config"]
    text = config if vision is None else config["text_config"]
    hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
    # The 4B's file leaves out what is transformers' default.
    heads = int(text.get("num_attention_heads", 8))
    kv_heads = int(text.get("num_key_value_heads", 4))
    head_dim, mlp = int(text.get("head_dim", 256)), int(text["intermediate_size"])
    kinds = text.get("layer_types")  # newer files list them, older ones give the period
    sliding = layers - layers // int(text.get("sliding_window_pattern", 6))
    if isinstance(kinds, list):
        sliding = kinds.count("sliding_attention")
    return ModelShape(
        name=name,
        family=str(config["model_type"]),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=int(text.get("max_position_embeddings", 131072)),
        linears=(
            (heads * head_dim, hidden, layers),
            (kv_heads * head_dim, hidden, 2 * layers),
            (hidden, heads * head_dim, layers),
            (mlp, hidden, 2 * layers),
            (hidden, mlp, layers),
        ),
        block_other=layers * (4 * hidden + 2 * head_dim) + hidden,
        embedding=int(text.get("vocab_size", 262208)) * hidden,
        head=0,
        tower=0 if vision is None else _siglip(vision, hidden),
        sliding_layers=sliding,
        sliding_window=int(text.get("sliding_window", 1024)),
    )


def _siglip(vision: Mapping[str, Any], hidden: int) -> int:
    """Weights of Gemma 3's vision tower and projector."""
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    side = int(vision["image_size"]) // int(vision["patch_size"])
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    patches = int(vision["patch_size"]) ** 2 * 3 * width + width + side * side * width
    tower = int(vision["num_hidden_layers"]) * block + patches + 2 * width
    return tower + width * hidden + width


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
