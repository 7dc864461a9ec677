"""Turns to token ids, once; user text can never become a special token.

The words are those Molmo was trained with. Knows the tokenizer, nothing of pictures or vLLM.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from molmo_edge.errors import ModelError, PromptError, PromptTooLongError
from molmo_edge.interface import Turn

# No vocabulary in use has longer tokens: 128 spaces, in Qwen2's.
_LONGEST_TOKEN = 128


class PromptEncoder:
    """Encodes conversations for one checkpoint.

    Args:
        tokenizer: the checkpoint's, of transformers.
        max_model_len: longest sequence in tokens; longer text is refused before tokenising.
    """

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._max_model_len = max_model_len
        self._special = {
            int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()
        }
        bos = tokenizer.bos_token_id
        bos = tokenizer.eos_token_id if bos is None else bos
        if bos is None:
            raise ModelError("The tokenizer names neither a BOS nor an EOS token.")
        self.bos = int(bos)

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of `` User: … Assistant:``, without BOS and image tokens.

        Raises:
            PromptError: empty or not text, roles out of order, or a special token in the text.
            PromptTooLongError: surely longer than the context.
        """
        check_turns(turns)
        words = [f" {turn.role.capitalize()}: {turn.text}" for turn in turns]
        text = "".join(words) + " Assistant:"
        if len(text) > self._max_model_len * _LONGEST_TOKEN:
            raise PromptTooLongError(
                f"The text has {len(text)} characters; the context holds "
                f"{self._max_model_len} tokens."
            )
        # transformers sets truncation on the shared tokenizer at each call.
        with self._lock:
            ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        refuse_special(ids, self._special)
        return ids


def refuse_special(ids: Sequence[int], special: Mapping[int, str]) -> None:
    """Raises PromptError when tokens of user text are among `special`: id → spelling."""
    if found := sorted({special[i] for i in ids if i in special}):
        raise PromptError(
            f"The text holds {', '.join(found[:3])}: special tokens of the model, which no user "
            "text may contain. Remove or respell them."
        )


def check_turns(turns: Sequence[Turn]) -> None:
    """Raises PromptError unless turns alternate, start and end with the user, and hold text."""
    if not turns:
        raise PromptError("The conversation is empty; give at least one user turn.")
    for i, turn in enumerate(turns):
        expected = "user" if i % 2 == 0 else "assistant"
        if turn.role != expected:
            raise PromptError(
                f"Turn {i + 1} must be the {expected}'s: roles alternate, the user's first."
            )
        check_text(turn.text)
    if len(turns) % 2 == 0:
        raise PromptError("The last turn must be the user's.")


def check_text(text: object) -> str:
    """The text itself. Raises PromptError when it is no text, empty, or not valid Unicode."""
    if not isinstance(text, str):
        raise PromptError(f"The text must be a str, not {type(text).__name__}.")
    if not text.strip():
        raise PromptError("The text is empty.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PromptError("The text holds lone surrogates, which are not valid Unicode.") from None
    return text
