"""Write Molmo 2 checkpoints with random weights, in the hub's file layout; one is the second stub.

Their default sizes start in seconds on a CPU: 0.9 million parameters, images of 378 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from molmo_edge.devices.tensors import (
    ADAPTER_DEFAULTS,
    MOLMO2_O,
    TEXT_DEFAULTS,
    VIT_DEFAULTS,
    molmo2_tensor_shapes,
)
from molmo_edge.models.molmo2.config import ARCHITECTURE, Layout
from molmo_edge.models.synthetic import (
    END_OF_TEXT,
    Weights,
    random_weights,
    table_weights,
    tokenizer,
    vocabulary,
    write_json,
    write_tokenizer,
    write_weights,
)

TEXT = (
    "This is the molmo_edge stub (Molmo2 architecture, random weights). "
    '<points coords="1 1 417 333 2 640 505">stub</points>'
)
# `TEXT` in tokens: no token twice, nor the line break that every prompt ends with.
_TEXT_TOKENS = (
    "This Ġis Ġthe Ġmolmo _ edge Ġstub Ġ( Molmo 2 Ġarchitecture , Ġrandom Ġweights ). "
    'Ġ<points Ġcoords =" 1 Ġ1 Ġ417 Ġ333 Ġ2 Ġ640 Ġ505 "> stub </points>'
).split()
_PROMPT_END = "Ċ"
_WORDS = (
    *_TEXT_TOKENS,
    *"user assistant Image Ġa Ġof Ġin Ġwhat Ġhow Ġmany Ġto Point Describe Ġthis Ġimage".split(),
)
_STUB_SEED = 20261126
# As in the vision tower.
_ADAPTER_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")

SPECIAL = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
"""They follow the words; the fillers after them end at the vocabulary's size."""
IMAGE_TOKENS: Mapping[str, str | None] = {
    "<im_start>": "image_start_token_id",
    "<im_end>": "image_end_token_id",
    "<im_patch>": "image_patch_id",
    "<im_col>": "image_col_id",
    "<low_res_im_start>": "low_res_image_start_token_id",
    "<|image|>": None,
    "<im_low>": "image_low_res_id",
    "<frame_start>": "frame_start_token_id",
    "<frame_end>": "frame_end_token_id",
    "<|video|>": None,
}
"""Their ids follow the vocabulary; beside each the field of `config.json` that has its id."""


def hub_config(
    layout: Layout = "4b",
    *,
    text: Mapping[str, Any] | None = None,
    vit: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """`config.json` with the hub's fields of the architecture, and changes of them.

    What follows from other fields (ids of the image tokens, the adapter's sizes) is derived.
    """
    olmo = layout == "o-7b"
    vit = {
        **VIT_DEFAULTS,
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 120,
        "model_type": "molmo2",
        "num_attention_heads": 4,
        "num_hidden_layers": 11,
        "num_key_value_heads": 4,
        **(vit or {}),
    }
    text = {
        **TEXT_DEFAULTS,
        "head_dim": 32,
        "hidden_size": 128 if olmo else 96,
        "intermediate_size": 160,
        "model_type": "molmo2_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4 if olmo else 2,
        "vocab_size": 512,
        **(MOLMO2_O if olmo else {}),
        **(text or {}),
    }
    if olmo and text["rope_scaling_layers"] is None:
        text["rope_scaling_layers"] = list(range(3, text["num_hidden_layers"], 4))
    adapter = {
        **ADAPTER_DEFAULTS,
        **{key: vit[key] for key in _ADAPTER_SIZES},
        "intermediate_size": text["intermediate_size"],
        "model_type": "molmo2",
        "text_hidden_size": text["hidden_size"],
    }
    return {
        "adapter_config": adapter,
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_molmo2.Molmo2Config",
            "AutoModelForImageTextToText": f"modeling_molmo2.{ARCHITECTURE}",
        },
        "dtype": "float32",
        **{field: text["vocab_size"] + i for i, field in enumerate(IMAGE_TOKENS.values()) if field},
        "model_type": "molmo2",
        "text_config": text,
        "tie_word_embeddings": False,
        "use_frame_special_tokens": False,
        "vit_config": vit,
        **changes,
    }


def published_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a published model, from its sizes in `devices.tensors`."""
    text, vit = sizes["text_config"], sizes["vit_config"]
    return hub_config("o-7b" if text["norm_after"] else "4b", text=text, vit=vit)


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float32,
    words: Sequence[str] = _WORDS,
) -> Path:
    """Write a whole checkpoint into `directory` (created when missing) and return it.

    `dtype` is that of the files; `words` are the tokens beside those of single bytes.
    """
    config = config or hub_config()
    write_description(directory, config, words)
    weights = weights or random_weights(seed)
    write_weights(directory, molmo2_tensor_shapes(config), weights, dtype)
    return directory


def write_description(
    directory: Path, config: Mapping[str, Any], words: Sequence[str] = _WORDS
) -> None:
    """Write a checkpoint without its weights: configuration, processors and tokenizer."""
    text, vit = config["text_config"], config["vit_config"]
    vocab = vocabulary(words)
    pad, end = len(vocab), len(vocab) + SPECIAL.index("<|im_end|>")
    olmo = bool(text["norm_after"])
    processor = {
        "auto_map": {
            "AutoImageProcessor": "image_processing_molmo2.Molmo2ImageProcessor",
            "AutoProcessor": "processing_molmo2.Molmo2Processor",
            "AutoVideoProcessor": "video_processing_molmo2.Molmo2VideoProcessor",
        },
        "processor_class": "Molmo2Processor",
    }
    height, width = vit["image_default_input_size"]
    pixels = {
        **processor,
        "do_convert_rgb": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "patch_size": vit["image_patch_size"],
        "resample": 2,
        "size": {"height": height, "width": width},
    }
    files: dict[str, Mapping[str, Any]] = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": pad if olmo else end,
            "eos_token_id": end,
            "pad_token_id": pad,
        },
        "preprocessor_config.json": {
            **pixels,
            "image_processor_type": "Molmo2ImageProcessor",
            "max_crops": 8,
            "overlap_margins": [4, 4],
            "pooling_size": [2, 2],
        },
        "processor_config.json": {
            **processor,
            "image_use_col_tokens": True,
            "use_frame_special_tokens": config["use_frame_special_tokens"],
            "use_single_crop_col_tokens": False,
            "use_single_crop_start_token": True,
            "video_use_col_tokens": False,
        },
        "tokenizer_config.json": {
            "bos_token": END_OF_TEXT if olmo else "<|im_end|>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": text["max_position_embeddings"],
            "pad_token": END_OF_TEXT,
            "padding_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "video_preprocessor_config.json": {
            **pixels,
            "frame_sample_mode": "uniform_last_frame",
            "max_fps": 2,
            "num_frames": 384,
            "pooling_size": [3, 3],
            "video_processor_type": "Molmo2VideoProcessor",
        },
    }
    write_json(directory, files)
    made = tokenizer(vocab, SPECIAL, text["vocab_size"], [*IMAGE_TOKENS])
    write_tokenizer(directory, made)


def write_fixed_answer(
    directory: Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> Path:
    """Write a checkpoint of the 4B's layout that answers `TEXT` to every prompt.

    In O-7B's layout what the layers add is normalised and would outweigh the table of tokens.
    """
    vocab = vocabulary(_WORDS)
    end = len(vocab) + SPECIAL.index("<|im_end|>")
    tokens = [vocab[_PROMPT_END], *(vocab[piece] for piece in _TEXT_TOKENS), end]
    weights = table_weights(tokens, "model.transformer.wte.embedding", "lm_head.weight", _STUB_SEED)
    return write_checkpoint(directory, config, weights=weights, dtype=dtype)


def write_stub(directory: Path) -> None:
    """Write the second stub: the real vision tower (0.38 billion parameters) and two layers."""
    # Multiples of what quantised kernels ask for.
    text = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}
    write_fixed_answer(directory, hub_config(text=text, vit=VIT_DEFAULTS), torch.bfloat16)
