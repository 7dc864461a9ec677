"""What a Molmo 1 checkpoint looks like: special tokens, geometry, and which layouts we support.

Knows files and numbers only; imports neither torch, transformers nor vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.errors import ModelError

IM_START = "<im_start>"
IM_END = "<im_end>"
IM_PATCH = "<im_patch>"
IM_COL = "<im_col>"
IMAGE = "<|image|>"
IMAGE_TOKENS = (IM_START, IM_END, IM_PATCH, IM_COL, IMAGE)

# Rows of `new_embedding`, behind the text vocabulary; hard-coded in the reference too.
ADDITIONAL_VOCAB_SIZE = 128

SUPPORTED = (
    "Supported Molmo 1 layouts: Molmo-7B-D-0924, Molmo-72B-0924 (qkv bias, norm before) and "
    "Molmo-7B-O-0924 (q/k norm, norm after)."
)


@dataclass(frozen=True)
class ImageTokenIds:
    """Token ids of the image tokens of one tokenizer."""

    start: int
    end: int
    patch: int
    col: int

    @classmethod
    def from_vocab(cls, vocab: Mapping[str, int]) -> ImageTokenIds:
        """Raises ModelError when the tokenizer lacks one of them."""
        missing = [token for token in IMAGE_TOKENS if token not in vocab]
        if missing:
            raise ModelError(
                f"The tokenizer has no {', '.join(missing)}; a Molmo 1 tokenizer holds all of "
                f"{', '.join(IMAGE_TOKENS)}."
            )
        return cls(vocab[IM_START], vocab[IM_END], vocab[IM_PATCH], vocab[IM_COL])


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder. Raises ModelError when missing or broken."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"No config.json in '{folder}'. A checkpoint folder holds config.json, the tokenizer's "
            "files and *.safetensors."
        ) from None
    except (OSError, ValueError) as exc:
        raise ModelError(f"'{path}' cannot be read as JSON.") from exc
    if not isinstance(config, dict):
        raise ModelError(f"'{path}' must hold a JSON object.")
    return config


def check_layout(config: Mapping[str, Any]) -> str:
    """Name of the layout family of a `config.json`: ``"molmo-d"`` or ``"molmo-o"``.

    Raises ModelError for anything the corrected model would not compute right.
    """
    model_type = config.get("model_type")
    if model_type != "molmo":
        raise ModelError(f"Model type '{model_type}' is not Molmo 1. {SUPPORTED}")
    wrong = [
        f"{key}={config.get(key, default)!r} (must be {default!r})"
        for key, default in (
            ("layer_norm_type", "rms"),
            ("clip_qkv", None),
            ("weight_tying", False),
            ("use_position_ids", True),
        )
        if config.get(key, default) != default
    ]
    # MolmoE-1B spells these out; the dense layouts have none.
    wrong += [key for key in ("moe_num_experts", "num_experts", "block_type") if config.get(key)]
    if wrong:
        raise ModelError(f"This Molmo layout is not supported: {', '.join(wrong)}. {SUPPORTED}")
    missing = [
        key
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if not isinstance(config.get(key), int)
    ]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}. {SUPPORTED}")
    shape = (
        bool(config.get("qkv_bias", False)),
        bool(config.get("attention_layer_norm", False)),
        bool(config.get("norm_after", False)),
    )
    family = {(True, False, False): "molmo-d", (False, True, True): "molmo-o"}.get(shape)
    if family is None:
        raise ModelError(
            f"qkv_bias={shape[0]}, attention_layer_norm={shape[1]}, norm_after={shape[2]} "
            f"together are not a released layout. {SUPPORTED}"
        )
    return family


def check_weights(folder: Path) -> None:
    """Raises ModelError unless every weight file that the checkpoint names is there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
            raise ModelError(f"'{index}' is not a safetensors index.") from exc
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ModelError(
                f"'{folder}' lacks {len(missing)} of {len(names)} weight files, first "
                f"'{missing[0]}'. Finish the download."
            )
    elif not any(folder.glob("*.safetensors")):
        raise ModelError(f"'{folder}' holds no *.safetensors weights.")
