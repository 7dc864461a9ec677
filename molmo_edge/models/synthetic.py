"""What Molmo checkpoints with random weights share: tensors, the stubs' answers, tokenizers, files.

Every weight is a pure function of its tensor's name and a seed, so that two machines write the same
checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

END_OF_TEXT = "<|endoftext|>"
# Added tokens are searched for one by one; the hub's tokenizers have some 400 fillers.
_MAX_ADDED = 1024

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


def table_weights(tokens: Sequence[int], embedding: str, head: str, seed: int) -> Weights:
    """Random weights that write `tokens[1:]` after `tokens[0]`: no token may occur twice.

    The table of next tokens is in the tensors named `embedding` and `head` of the language model.
    """
    random = random_weights(seed)

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == head:
            # Each token's row of the head answers to the embedding of the token before it.
            rows = random_tensor(name, shape, seed, 0.02)
            known = random_tensor(embedding, shape, seed, 1.0)
            # After its end the answer starts again, for benchmarks that ignore the end.
            for before, after in itertools.pairwise([*tokens, tokens[1]]):
                rows[after] += known[before] * (4.0 / known[before].norm())
            return rows
        if ".blocks." in name and not name.endswith("norm.weight"):
            # Small, so that the table outweighs whatever the layers add.
            return random_tensor(name, shape, seed, 0.02)
        return random(name, shape)

    return weight


def vocabulary(words: Iterable[str]) -> dict[str, int]:
    """Byte tokens, by value, then `words`; ``Ġ`` stands for a leading space."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = set(ByteLevel.alphabet())
    # Bytes that cannot be printed stand for the characters from 256 on.
    others = itertools.count(256)
    pieces = [chr(b) if chr(b) in alphabet else chr(next(others)) for b in range(256)]
    return {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *words]))}


def tokenizer(
    vocab: Mapping[str, int], special: Sequence[str], rows: int, image_tokens: Sequence[str]
) -> Any:
    """A tokenizer of `vocab`, the `special` tokens, fillers up to `rows`, and `image_tokens`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = dict(vocab)
    added = [*special, *(f"|<EXTRA_TOKENS_{i}>|" for i in range(rows - len(vocab) - len(special)))]
    if len(added) > _MAX_ADDED:
        # Only the fillers' ids matter, and plain tokens are not searched for in every text.
        vocab |= {token: i for i, token in enumerate(added, len(vocab))}
        added = [*special]
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    added += image_tokens
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return made


def write_json(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `files` into `directory`, which is created when missing."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(directory: Path, tokenizer: Any) -> None:
    """Write ``tokenizer.json``; its own method raises a bare Exception on a full disk."""
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def write_weights(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], weights: Weights, dtype: torch.dtype
) -> None:
    """Write ``model.safetensors`` with a tensor for each of `shapes`."""
    from safetensors.torch import save_file

    tensors = {name: weights(name, shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
