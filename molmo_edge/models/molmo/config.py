"""Which Molmo 1 checkpoints can be run. Imports neither torch, transformers nor vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from molmo_edge.errors import ModelError

Family = Literal["molmo-d", "molmo-o"]

SUPPORTED = (
    "Supported Molmo 1 layouts: Molmo-7B-D-0924, Molmo-72B-0924 (qkv bias, norm before) and "
    "Molmo-7B-O-0924 (q/k norm, norm after)."
)

# config.json may leave these out, but not say otherwise: vLLM's model computes only this.
_FIXED: Mapping[str, object] = {
    "layer_norm_type": "rms",
    "clip_qkv": None,
    "weight_tying": False,
    "use_position_ids": True,
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_layout(config: Mapping[str, Any]) -> Family:
    """Return the layout of a `config.json`: ``"molmo-d"`` or ``"molmo-o"``.

    Raises ModelError for a layout that the corrected model would compute wrongly.
    """
    if (model_type := config.get("model_type")) != "molmo":
        raise ModelError(f"Model type '{model_type}' is not Molmo 1. {SUPPORTED}")
    wrong = [
        f"{key}={config[key]!r} (must be {value!r})"
        for key, value in _FIXED.items()
        if config.get(key, value) != value
    ]
    # MolmoE-1B has these; the dense layouts do not.
    wrong += [key for key in ("moe_num_experts", "num_experts", "block_type") if config.get(key)]
    if wrong:
        raise ModelError(f"This Molmo layout is not supported: {', '.join(wrong)}. {SUPPORTED}")
    if missing := [key for key in _SIZES if not isinstance(config.get(key), int)]:
        raise ModelError(f"config.json lacks {', '.join(missing)}. {SUPPORTED}")
    flags = tuple(
        bool(config.get(key, False)) for key in ("qkv_bias", "attention_layer_norm", "norm_after")
    )
    if flags == (True, False, False):
        return "molmo-d"
    if flags == (False, True, True):
        return "molmo-o"
    raise ModelError(
        f"qkv_bias={flags[0]}, attention_layer_norm={flags[1]}, norm_after={flags[2]} is not a "
        f"released layout. {SUPPORTED}"
    )
