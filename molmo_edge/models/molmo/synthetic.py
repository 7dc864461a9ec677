"""Write Molmo 1 checkpoints with random weights, in the hub's file layout; one is the stub.

Every weight is a pure function of its tensor's name and a seed, so that two machines write the same
checkpoint. The vision tower has its real size (0.29 billion parameters) by default.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molmo_edge.devices.tensors import Tower, tensor_shapes
from molmo_edge.models.molmo.config import DEFAULTS, Layout
from molmo_edge.models.molmo.image_processor import FIXED
from molmo_edge.models.molmo.prompts import IMAGE_TOKENS
from molmo_edge.models.molmo.tiling import DEFAULT_MAX_CROPS

END_OF_TEXT = "<|endoftext|>"
# Whole-word tokens of the synthetic tokenizer; everything else is split into bytes.
_WORDS = (
    "User Assistant This is the a of in and what how many point to there are image describe on "
    "molmo edge stub real architecture random weights table red mug"
).split()

# Added tokens are searched for one by one; the hub's tokenizers have some 400 fillers.
_MAX_ADDED = 1024

TEXT = "This is the molmo_edge stub (real architecture, random weights)."
# `TEXT` in tokens: no token twice, nor the colon of "Assistant:", which starts it.
_TEXT_TOKENS = (
    "ĠThis Ġis Ġthe Ġmolmo _ edge Ġstub Ġ ( real Ġarchitecture , Ġrandom Ġweights ) ."
).split()
NOTICE = (
    "This is the built-in stub: real Molmo architecture, random weights. Its answers mean "
    "nothing; give a checkpoint for real ones."
)
_STUB_SEED = 20251208

Weights = Callable[[str, tuple[int, ...]], torch.Tensor]


def random_tensor(name: str, shape: tuple[int, ...], seed: int, scale: float) -> torch.Tensor:
    """Normal float32 values that depend on `name` and `seed` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).mul_(scale)


def random_weights(seed: int) -> Weights:
    """Weights that keep activations of order one, so that every part of the model matters."""

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith(("norm.weight", "ln.weight", "ln_f.weight")):
            return 1.0 + random_tensor(name, shape, seed, 0.1)
        if name.endswith(".bias"):
            return random_tensor(name, shape, seed, 0.1)
        if len(shape) == 2 and name.endswith(".weight"):
            return random_tensor(name, shape, seed, 1.0 / math.sqrt(shape[1]))
        scale = 0.5 if "positional" in name else 1.0
        return random_tensor(name, shape, seed, scale)

    return weight


def hub_config(layout: Layout = "7b-d", **changes: Any) -> dict[str, Any]:
    """`config.json` with the hub's fields, `auto_map` included.

    The sizes load in seconds on a CPU; `changes` override them.
    """
    d_like = layout == "7b-d"
    return {
        **DEFAULTS,
        "architectures": ["MolmoForCausalLM"],
        "attention_layer_norm": not d_like,
        "auto_map": {
            "AutoConfig": "config_molmo.MolmoConfig",
            "AutoModelForCausalLM": "modeling_molmo.MolmoForCausalLM",
        },
        "embedding_size": 512,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "model_type": "molmo",
        "norm_after": not d_like,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "qkv_bias": d_like,
        "rope_theta": 1_000_000.0 if d_like else 500_000.0,
        "torch_dtype": "float32",
        "transformers_version": "4.43.3",
        "vocab_size": 512,
        **changes,
    }


def published_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a published model, from its sizes in `devices.tensors`."""
    layout: Layout = "7b-d" if sizes["qkv_bias"] else "7b-o"
    return hub_config(layout, **sizes, vocab_size=sizes["embedding_size"])


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    weights: Weights | None = None,
    tower: Tower | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a whole checkpoint into `directory` (created when missing) and return it.

    `dtype` is that of the files; bfloat16 halves the tower's 1.2 GB and loads as the same values
    in float32.
    """
    from safetensors.torch import save_file

    config = config or hub_config()
    make = weights or random_weights(seed)
    write_description(directory, config)
    shapes = tensor_shapes(config, tower)
    tensors = {name: make(name, size).to(dtype) for name, size in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_description(directory: Path, config: Mapping[str, Any]) -> None:
    """Write a checkpoint without its weights: configuration, processor and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    auto_map = {
        "AutoImageProcessor": "image_preprocessing_molmo.MolmoImageProcessor",
        "AutoProcessor": "preprocessing_molmo.MolmoProcessor",
    }
    names = {"auto_map": auto_map, "processor_class": "MolmoProcessor"}
    files: dict[str, Mapping[str, Any]] = {
        "config.json": config,
        "preprocessor_config.json": {**FIXED, "max_crops": DEFAULT_MAX_CROPS, **names},
        "processor_config.json": names,
        "generation_config.json": {"eos_token_id": len(vocabulary()), "do_sample": False},
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "bos_token": None if config["qkv_bias"] else END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "model_max_length": config["max_position_embeddings"],
            "pad_token": END_OF_TEXT,
            "processor_class": "MolmoProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _tokenizer(config["embedding_size"]).save(str(directory / "tokenizer.json"))


def write_stub(directory: Path) -> None:
    """Write the stub: random weights, and a next-token table that spells `TEXT`.

    The table is in the embedding and the head of the language model.
    """
    config = hub_config()
    random = random_weights(_STUB_SEED)
    size = (config["embedding_size"], config["hidden_size"])
    embedding = random_tensor("model.transformer.wte.embedding", size, _STUB_SEED, 1.0)
    # Each token's row of the head answers to the embedding of the token before it.
    head = random_tensor("model.transformer.ff_out.weight", size, _STUB_SEED, 0.02)
    vocab = vocabulary()
    sentence = [vocab[token] for token in _TEXT_TOKENS]
    # After its end the sentence starts again, for benchmarks that ignore the end.
    chain = [vocab[":"], *sentence, len(vocab), sentence[0]]
    for before, after in itertools.pairwise(chain):
        head[after] += embedding[before] * (4.0 / embedding[before].norm())

    def weight(name: str, size: tuple[int, ...]) -> torch.Tensor:
        if name == "model.transformer.wte.embedding":
            return embedding
        if name == "model.transformer.ff_out.weight":
            return head
        if ".blocks." in name and not name.endswith("norm.weight"):
            # Small, so that the table outweighs whatever the layers add.
            return random_tensor(name, size, _STUB_SEED, 0.02)
        return random(name, size)

    write_checkpoint(directory, config, weights=weight)


def vocabulary() -> dict[str, int]:
    """Byte and word tokens of the synthetic tokenizer; ``Ġ`` stands for a leading space."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = sorted(ByteLevel.alphabet())
    pieces += [f"{space}{word}" for word in _WORDS for space in ("", "Ġ") if len(space + word) > 1]
    return {piece: i for i, piece in enumerate(pieces)}


def _tokenizer(embedding_size: int) -> Any:
    """A tokenizer whose image tokens have the first ids that are not in the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = vocabulary()
    fillers = [f"|<EXTRA_TOKENS_{i}>|" for i in range(embedding_size - len(vocab) - 1)]
    if len(fillers) > _MAX_ADDED:
        # Only their ids matter, and plain tokens are not searched for in every text.
        vocab |= {token: i for i, token in enumerate([END_OF_TEXT, *fillers], len(vocab))}
        fillers = []
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [END_OF_TEXT, *fillers, *IMAGE_TOKENS]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return tokenizer
