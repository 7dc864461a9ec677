"""Weights of the built-in stub: a next-token table that spells its sentence, in quiet layers."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from molmo_edge.models.molmo.stub import TOKENS
from molmo_edge.models.molmo.synthetic import (
    Shape,
    Weights,
    random_tensor,
    random_weights,
    vocabulary,
    write_checkpoint,
)

_SEED = 20251208


def write(folder: Path) -> None:
    """Writes the stub checkpoint into `folder`."""
    write_checkpoint(folder, weights=_weights(Shape()))


def _weights(shape: Shape) -> Weights:
    drawn = random_weights(_SEED)
    table = _next_token_table(shape)

    def weight(name: str, size: tuple[int, ...]) -> torch.Tensor:
        if name == "model.transformer.wte.embedding":
            return _embedding(size)
        if name == "model.transformer.ff_out.weight":
            return table
        if ".blocks." in name and not name.endswith("norm.weight"):
            # Quiet layers: the table must win over whatever they add.
            return random_tensor(name, size, _SEED, 0.02)
        return drawn(name, size)

    return weight


def _embedding(size: tuple[int, ...]) -> torch.Tensor:
    return random_tensor("model.transformer.wte.embedding", size, _SEED, 1.0)


def _next_token_table(shape: Shape) -> torch.Tensor:
    """Head whose row for a token answers to the embedding of the token before it."""
    size = (shape.embedding_size, shape.hidden_size)
    embedding = _embedding(size)
    head = random_tensor("model.transformer.ff_out.weight", size, _SEED, 0.02)
    vocab = vocabulary()
    end_of_text = len(vocab)
    sentence = [vocab[token] for token in TOKENS]
    # Behind its end the sentence starts again, for benchmarks that ignore the end.
    chain = [vocab[":"], *sentence, end_of_text, sentence[0]]
    for before, after in itertools.pairwise(chain):
        head[after] += embedding[before] * (4.0 / embedding[before].norm())
    return head
