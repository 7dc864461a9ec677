"""Molmo 2's prompts: image tokens, and turns to token ids as the model was trained.

Images and videos stand before all text, in the order of the turns; user text can never become a
special token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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


class PromptEncoder(TextEncoder):
    """Encodes conversations for one checkpoint."""

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        super().__init__(tokenizer, max_model_len)
        by_name = {token: i for i, token in self.special.items()}
        try:
            self._start, self._end = by_name["<|im_start|>"], by_name["<|im_end|>"]
        except KeyError as exc:
            raise ModelError(f"The tokenizer has no {exc}, which Molmo 2's chats need.") from None

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of the turns and the start of the answer, without BOS, images and video.

        Raises:
            PromptError: empty or not a string, roles out of order, or a special token in the text.
            PromptTooLongError: certainly longer than the context.
        """
        check_turns(turns)
        # The blank before a past answer is the chat template's.
        text = "".join(
            f"{' ' if turn.role == 'assistant' else ''}<|im_start|>{turn.role}\n{turn.text}"
            "<|im_end|>\n"
            for turn in turns
        )
        ids = self.text(f"{text}<|im_start|>assistant\n")
        # The template's own tokens; any other came from the turns.
        own = Counter({self._start: len(turns) + 1, self._end: len(turns)})
        refuse_special(list(Counter(i for i in ids if i in self.special) - own), self.special)
        return ids
