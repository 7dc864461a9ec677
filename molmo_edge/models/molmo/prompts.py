"""Molmo 1's prompts: special tokens, and turns to token ids as the model was trained.

User text can never become a special token.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo_edge.errors import ModelError
from molmo_edge.interface import Turn
from molmo_edge.requests import check_length, check_turns, refuse_special

IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")
ONE_IMAGE = (
    "Molmo 1 takes one image per request: it was trained on single images, and a second one would "
    "get the positions of the first."
)
# Longest token of any vocabulary in use, in characters: 128 spaces, in Qwen2's.
LONGEST_TOKEN = 128


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
        if missing := [token for token in IMAGE_TOKENS if token not in vocab]:
            raise ModelError(
                f"The tokenizer has no {', '.join(missing)}; a Molmo 1 tokenizer has all of "
                f"{', '.join(IMAGE_TOKENS)}."
            )
        return cls(*(vocab[token] for token in IMAGE_TOKENS[:4]))


def bos_id(tokenizer: Any) -> int:
    """Id that starts every sequence: BOS, or EOS for tokenizers without BOS (7B-D)."""
    bos = tokenizer.bos_token_id
    bos = tokenizer.eos_token_id if bos is None else bos
    if bos is None:
        raise ModelError("The tokenizer has neither a BOS nor an EOS token.")
    return int(bos)


class PromptEncoder:
    """Encodes conversations for one checkpoint.

    Args:
        tokenizer: the checkpoint's, from transformers.
        max_model_len: longest sequence in tokens; longer text is refused before tokenising.
    """

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self.bos = bos_id(tokenizer)
        self.special = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._lock = threading.Lock()

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of `` User: … Assistant:``, without BOS and image tokens.

        Raises:
            PromptError: empty or not a string, roles out of order, or a special token in the text.
            PromptTooLongError: certainly longer than the context.
        """
        check_turns(turns)
        text = "".join(f" {turn.role.capitalize()}: {turn.text}" for turn in turns) + " Assistant:"
        check_length(len(text) // LONGEST_TOKEN, self._max_model_len)
        # transformers sets truncation on the shared tokenizer at each call.
        with self._lock:
            encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
        refuse_special(ids, self.special)
        return ids
