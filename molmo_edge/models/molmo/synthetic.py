"""Write Molmo 1 checkpoints with random weights, in the hub's file layout; one is the stub.

The vision tower has its real size (0.29 billion parameters) by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from molmo_edge.devices.tensors import MOLMO_DEFAULTS, MOLMO_O, Tower, tensor_shapes
from molmo_edge.models.molmo.config import Layout
from molmo_edge.models.molmo.image_processor import FIXED
from molmo_edge.models.molmo.prompts import IMAGE_TOKENS
from molmo_edge.models.molmo.tiling import DEFAULT_MAX_CROPS
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

# Whole-word tokens of the synthetic tokenizer; everything else is split into bytes.
_WORDS = (
    "User Assistant This is the a of in and what how many point to there are image describe on "
    "molmo edge stub real architecture random weights table red mug"
).split()
_PIECES = [f"{space}{word}" for word in _WORDS for space in ("", "Ġ")]

TEXT = "This is the molmo_edge stub (real architecture, random weights)."
# `TEXT` in tokens: no token twice, nor the colon of "Assistant:", which starts it.
_TEXT_TOKENS = (
    "ĠThis Ġis Ġthe Ġmolmo _ edge Ġstub Ġ ( real Ġarchitecture , Ġrandom Ġweights ) ."
).split()
_STUB_SEED = 20251208

# Like the published one it has no BOS, and no space in front of the first role.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else ' ' }}{{ message.role | capitalize }}: {{ message.content }}"
    "{% endfor %}{{ ' Assistant:' if add_generation_prompt }}"
)


def hub_config(layout: Layout = "7b-d", **changes: Any) -> dict[str, Any]:
    """`config.json` with the hub's fields, `auto_map` included.

    The sizes load in seconds on a CPU; `changes` override them.
    """
    return {
        **MOLMO_DEFAULTS,
        "architectures": ["MolmoForCausalLM"],
        "auto_map": {
            "AutoConfig": "config_molmo.MolmoConfig",
            "AutoModelForCausalLM": "modeling_molmo.MolmoForCausalLM",
        },
        "embedding_size": 512,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "model_type": "molmo",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "torch_dtype": "float32",
        "transformers_version": "4.43.3",
        "vocab_size": 512,
        **(MOLMO_O if layout == "7b-o" else {}),
        **changes,
    }


def published_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a published model, from its sizes in `devices.tensors`."""
    return hub_config(**{**sizes, "vocab_size": sizes["embedding_size"]})


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    weights: Weights | None = None,
    tower: Tower | None = None,
    dtype: torch.dtype = torch.bfloat16,
    words: Sequence[str] = (),
) -> Path:
    """Write a whole checkpoint into `directory` (created when missing) and return it.

    `words` are further tokens, a leading space written as ``Ġ``.

    `dtype` is that of the files; bfloat16 halves the tower's 1.2 GB and loads as the same values
    in float32.
    """
    config = config or hub_config()
    write_description(directory, config, words)
    weights = weights or random_weights(seed)
    write_weights(directory, tensor_shapes(config, tower), weights, dtype)
    return directory


def write_description(
    directory: Path, config: Mapping[str, Any], words: Sequence[str] = ()
) -> None:
    """Write a checkpoint without its weights: configuration, processor and tokenizer."""
    vocab = vocabulary([*_PIECES, *words])
    auto_map = {
        "AutoImageProcessor": "image_preprocessing_molmo.MolmoImageProcessor",
        "AutoProcessor": "preprocessing_molmo.MolmoProcessor",
    }
    names = {"auto_map": auto_map, "processor_class": "MolmoProcessor"}
    files: dict[str, Mapping[str, Any]] = {
        "config.json": config,
        "preprocessor_config.json": {**FIXED, "max_crops": DEFAULT_MAX_CROPS, **names},
        "processor_config.json": names,
        "generation_config.json": {"eos_token_id": len(vocab), "do_sample": False},
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "bos_token": None if config["qkv_bias"] else END_OF_TEXT,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "model_max_length": config["max_position_embeddings"],
            "pad_token": END_OF_TEXT,
            "processor_class": "MolmoProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    write_json(directory, files)
    rows = config["embedding_size"]
    write_tokenizer(directory, tokenizer(vocab, [END_OF_TEXT], rows, IMAGE_TOKENS))


def write_stub(directory: Path) -> None:
    """Write the stub: random weights that answer `TEXT` to every prompt."""
    vocab = vocabulary(_PIECES)
    tokens = [vocab[":"], *(vocab[piece] for piece in _TEXT_TOKENS), len(vocab)]
    embedding, head = "model.transformer.wte.embedding", "model.transformer.ff_out.weight"
    write_checkpoint(directory, weights=table_weights(tokens, embedding, head, _STUB_SEED))
