"""Text to token ids, for the chat formats of Molmo 1 and 2."""

from __future__ import annotations

import threading
from typing import Any

from molmo_edge.errors import ModelError
from molmo_edge.requests import check_length, refuse_special

# Longest token of any vocabulary in use, in characters: 128 spaces, in Qwen2's.
_LONGEST_TOKEN = 128


def bos_id(tokenizer: Any) -> int:
    """Id that starts every sequence: BOS, or EOS for tokenizers without BOS (7B-D)."""
    bos = tokenizer.bos_token_id
    bos = tokenizer.eos_token_id if bos is None else bos
    if bos is None:
        raise ModelError("The tokenizer has neither a BOS nor an EOS token.")
    return int(bos)


def template_with_bos(template: object, bos: str, after: str = "") -> str | None:
    """The checkpoint's chat template with BOS, and `after`, in front; None for none, or with BOS.

    AllenAI's templates have no BOS, which AllenAI's code adds to token ids; a server tokenises what
    the template writes and adds nothing.
    """
    if not isinstance(template, str) or "bos_token" in template:
        return None
    # As an expression, since a tag such as {%- removes a space in front of it.
    return '{{ "' + bos + after + '" }}' + template


class TextEncoder:
    """Encodes text for one checkpoint, from any thread.

    `max_model_len` is the longest sequence in tokens; longer text is refused before tokenising.
    """

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self.bos = bos_id(tokenizer)
        # Spelling of each added token.
        self.special = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._lock = threading.Lock()

    def text(self, text: str) -> list[int]:
        """Token ids of a text, special tokens in it included.

        Raises PromptTooLongError when it is certainly longer than the context.
        """
        check_length(len(text) // _LONGEST_TOKEN, self._max_model_len)
        # transformers sets truncation on the shared tokenizer at each call.
        with self._lock:
            encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def plain(self, text: str) -> list[int]:
        """`text`, but raises PromptError for special tokens."""
        ids = self.text(text)
        refuse_special(ids, self.special)
        return ids
