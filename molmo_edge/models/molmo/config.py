"""Which Molmo 1 checkpoints can be run. Imports neither torch, transformers nor vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from molmo_edge.devices.tensors import MOLMO_DEFAULTS
from molmo_edge.errors import ModelError

# Of Molmo-7B-D (and 72B), and of Molmo-7B-O.
Layout = Literal["7b-d", "7b-o"]

SUPPORTED = (
    "Supported Molmo 1 layouts: Molmo-7B-D-0924, Molmo-72B-0924 (qkv bias, norm before) and "
    "Molmo-7B-O-0924 (q/k norm, norm after)."
)

# A checkpoint may not say otherwise: vLLM's model computes only this.
_FIXED = ("layer_norm_type", "clip_qkv", "weight_tying", "use_position_ids")
# MolmoE-1B has these.
_MIXTURE = ("moe_num_experts", "num_experts", "block_type")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FLAGS = ("qkv_bias", "attention_layer_norm", "norm_after")
_RELEASED = ((True, False, False), (False, True, True))


def check_layout(config: Mapping[str, Any]) -> None:
    """Raise ModelError for a `config.json` that the corrected model would compute wrongly."""
    if (model_type := config.get("model_type")) != "molmo":
        raise ModelError(f"Model type '{model_type}' is not Molmo 1. {SUPPORTED}")
    if "text_config" in config:
        raise ModelError(
            "config.json has the field names of transformers' own Molmo (text_config), and the "
            f"tensors are named accordingly. Use AllenAI's checkpoint. {SUPPORTED}"
        )
    wrong = [
        f"{key}={config[key]!r} (must be {MOLMO_DEFAULTS[key]!r})"
        for key in _FIXED
        if config.get(key, MOLMO_DEFAULTS[key]) != MOLMO_DEFAULTS[key]
    ]
    wrong += [key for key in _MIXTURE if config.get(key)]
    if wrong:
        raise ModelError(f"This Molmo layout is not supported: {', '.join(wrong)}. {SUPPORTED}")
    if missing := [key for key in _SIZES if not isinstance(config.get(key), int)]:
        raise ModelError(f"config.json lacks {', '.join(missing)}. {SUPPORTED}")
    flags = {key: bool(config.get(key, False)) for key in _FLAGS}
    if tuple(flags.values()) not in _RELEASED:
        stated = ", ".join(f"{key}={value}" for key, value in flags.items())
        raise ModelError(f"{stated} is not a released layout. {SUPPORTED}")
