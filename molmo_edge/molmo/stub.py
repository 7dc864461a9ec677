"""The embedded default model: real Molmo architecture, made-up weights, no download.

Its tiny language model is built, not drawn: embedding and head hold a next-token table that spells
`TEXT`, so that a newcomer reads what this is instead of gibberish.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from molmo_edge.molmo.synthetic import (
    Shape,
    Weights,
    ensure_written,
    random_tensor,
    random_weights,
    vocabulary,
    write_checkpoint,
)

NAME = "stub"
# The sentence in tokens; none may stand in it twice, nor the colon of "Assistant:" that starts it.
TOKENS = (
    "ĠThis Ġis Ġthe Ġmolmo _ edge Ġstub Ġ ( real Ġarchitecture , Ġmade - up Ġweights ) ."
).split()
TEXT = "This is the molmo_edge stub (real architecture, made-up weights)."
NOTICE = (
    "This is the built-in stub: real Molmo architecture, made-up weights. Its answers mean "
    "nothing; give a checkpoint for real ones."
)
_VERSION = 1
_SEED = 20251208


def ensure_stub(cache_dir: Path) -> Path:
    """Folder of the stub checkpoint (0.6 GB), written on first use.

    Raises ModelError when the cache folder cannot be written.
    """
    return ensure_written(
        cache_dir / f"stub-{_VERSION}",
        lambda folder: write_checkpoint(folder, weights=_weights(Shape())),
        "The stub checkpoint (0.6 GB)",
    )


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
