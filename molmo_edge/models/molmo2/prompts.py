"""Molmo 2's prompts: image tokens, and turns to token ids as the model was trained.

Images and videos stand before all text, in the order of the turns; user text can never become a
special token.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo_edge.errors import ModelError
from molmo_edge.interface import Turn
from molmo_edge.models.molmo2.config import ImageIds, Processing
from molmo_edge.models.molmo2.tiling import Tiling
from molmo_edge.models.prompts import TextEncoder
from molmo_edge.requests import check_turns, refuse_special

Ids = npt.NDArray[np.int64]


def image_tokens(tiling: Tiling, ids: ImageIds, processing: Processing) -> Ids:
    """Tokens of one image, (n,) int64: the global view, then the grid of crops."""
    start = ids.low_res_start if processing.base_start else ids.start
    return np.concatenate(
        [
            _view(start, tiling.base_grid, ids.end, ids, processing.base_cols),
            _view(ids.start, tiling.grid, ids.end, ids, processing.cols),
        ]
    )


def frame_tokens(ids: ImageIds, processing: Processing) -> Ids:
    """Tokens of one frame of a video, (n,) int64, without its time."""
    start, end = (
        (ids.frame_start, ids.frame_end) if processing.frame_tokens else (ids.start, ids.end)
    )
    return _view(start, processing.geometry.frame_grid, end, ids, processing.frame_cols)


def _view(start: int, grid: tuple[int, int], end: int, ids: ImageIds, cols: bool) -> Ids:
    rows, columns = grid
    view = np.full((rows, columns + cols), ids.patch, dtype=np.int64)
    view[:, columns:] = ids.col
    return np.concatenate([[start], view.reshape(-1), [end]])


def chat_text(turns: Sequence[Turn]) -> str:
    """A conversation and the start of the answer, as Molmo 2 was trained."""
    # The blank before a past answer is the chat template's.
    text = "".join(
        f"{' ' if turn.role == 'assistant' else ''}<|im_start|>{turn.role}\n{turn.text}<|im_end|>\n"
        for turn in turns
    )
    return f"{text}<|im_start|>assistant\n"


def chat_writer(tokenizer: Any) -> Callable[[Sequence[Turn]], str]:
    """`chat_text`, or the checkpoint's chat template if that writes something else.

    Raises ModelError for a template that does not write what is said.
    """
    if not isinstance(tokenizer.chat_template, str):
        return chat_text

    def by_template(turns: Sequence[Turn], *, parts: bool) -> str:
        messages = [
            {
                "role": turn.role,
                "content": [{"type": "text", "text": turn.text}] if parts else turn.text,
            }
            for turn in turns
        ]
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text.removeprefix(tokenizer.bos_token or "")

    said = [Turn("user", "7391"), Turn("assistant", "2846"), Turn("user", "5073")]
    for parts in (True, False):
        try:
            text = by_template(said, parts=parts)
        except Exception:  # of jinja, or what the template raises
            continue
        if text == chat_text(said):
            return chat_text
        whole = re.search(".*".join(turn.text for turn in said), text, re.DOTALL)
        if whole and "{" not in text:  # else the list of parts was written as it is
            return partial(by_template, parts=parts)
    raise ModelError("The checkpoint's chat template does not write a conversation of texts.")


class PromptEncoder(TextEncoder):
    """Encodes conversations for one checkpoint.

    Attributes:
        answer_prefix: see `Rendered`; a space, unless the start of the answer ends in one.
    """

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        super().__init__(tokenizer, max_model_len)
        self._write = chat_writer(tokenizer)
        for token in ("<|im_start|>", "<|im_end|>"):
            if self._write is chat_text and token not in self.special.values():
                raise ModelError(f"The tokenizer has no {token}, which Molmo 2's chats need.")
        # Turns alternate, so their number says what the form itself has.
        self._own_special = cache(self._special_of_form)
        self.answer_prefix = "" if self._write([Turn("user", "")])[-1].isspace() else " "

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of the turns and the start of the answer, without BOS, images and video.

        Raises:
            PromptError: empty or not a string, roles out of order, or a special token in the text.
            PromptTooLongError: certainly longer than the context.
        """
        check_turns(turns)
        ids = self.text(self._write(turns))
        # Any that the form itself has not came from the turns.
        refuse_special(list(self._special_in(ids) - self._own_special(len(turns))), self.special)
        return ids

    def _special_of_form(self, n_turns: int) -> Counter[int]:
        turns = [Turn(("user", "assistant")[i % 2], "") for i in range(n_turns)]
        return self._special_in(self.text(self._write(turns)))

    def _special_in(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(i for i in ids if i in self.special)
