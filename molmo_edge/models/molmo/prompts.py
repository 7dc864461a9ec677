"""Molmo 1's prompts: special tokens, and turns to token ids as the model was trained.

User text can never become a special token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from molmo_edge.errors import ModelError
from molmo_edge.interface import Turn
from molmo_edge.models.prompts import TextEncoder
from molmo_edge.requests import check_turns

IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")
ONE_IMAGE = (
    "Molmo 1 takes one image per request: it was trained on single images, and a second one would "
    "get the positions of the first."
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
        if missing := [token for token in IMAGE_TOKENS if token not in vocab]:
            raise ModelError(
                f"The tokenizer has no {', '.join(missing)}; a Molmo 1 tokenizer has all of "
                f"{', '.join(IMAGE_TOKENS)}."
            )
        return cls(*(vocab[token] for token in IMAGE_TOKENS[:4]))


class PromptEncoder(TextEncoder):
    """Encodes conversations for one checkpoint."""

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of `` User: … Assistant:``, without BOS and image tokens.

        Raises:
            PromptError: empty or not a string, roles out of order, or a special token in the text.
            PromptTooLongError: certainly longer than the context.
        """
        check_turns(turns)
        text = "".join(f" {turn.role.capitalize()}: {turn.text}" for turn in turns) + " Assistant:"
        return self.plain(text)
