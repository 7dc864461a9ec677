"""Geometry of Molmo 1 pictures: which tiling, which tokens, which feature goes where.

Everything here is whole numbers and a few float32 divisions; pixels are the image processor's
business. Sizes are (height, width) in pixels, tilings (rows, columns) of crops. Geometry as in
AllenAI's preprocessing code for Molmo-*-0924.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from molmo_edge.models.molmo.layout import ImageTokenIds

BASE = 336  # side of one crop, pixels
PATCH = 14  # side of one ViT patch, pixels
GRID = BASE // PATCH  # 24 patches a crop side
MARGIN = 4  # patches that a crop shares with each neighbour
WINDOW = GRID - 2 * MARGIN  # 16 patches a crop adds
STRIDE = WINDOW * PATCH  # 224 pixels
TOTAL_MARGIN = 2 * MARGIN * PATCH  # 112 pixels
POOLED = GRID // 2  # 12 pooled features a crop side
DEFAULT_MAX_CROPS = 12


@lru_cache(maxsize=64)
def _candidates(max_crops: int) -> npt.NDArray[np.int32]:
    """All tilings of at most `max_crops` crops, small first: argmin and argmax favour those."""
    pairs = [
        (i, j)
        for i in range(1, max_crops + 1)
        for j in range(1, max_crops + 1)
        if i * j <= max_crops
    ]
    return np.array(sorted(pairs, key=lambda p: (p[0] * p[1], p[0])), dtype=np.int32)


def select_tiling(height: int, width: int, max_crops: int = DEFAULT_MAX_CROPS) -> tuple[int, int]:
    """Tiling (rows, columns) for a picture of `height` × `width` pixels.

    The least upscaling that covers the picture, else the least downscaling. Pictures of 112 pixels
    or less on a side give infinite or negative scales, which pick as the reference does.
    """
    candidates = _candidates(max_crops)
    size = np.array([height - TOTAL_MARGIN, width - TOTAL_MARGIN], dtype=np.float32)
    with np.errstate(divide="ignore"):
        scale = ((candidates * STRIDE).astype(np.float32) / size).min(axis=-1)
    if np.all(scale < 1):
        best = np.argmax(scale)
    else:
        best = np.argmin(np.where(scale < 1.0, np.float32(10e9), scale))
    rows, cols = candidates[best]
    return int(rows), int(cols)


@dataclass(frozen=True)
class Layout:
    """Where the features of one tiled picture go.

    Attributes:
        rows, cols: the tiling, in crops.
    """

    rows: int
    cols: int

    @property
    def n_crops(self) -> int:
        """Crops of the grid; the global view comes on top."""
        return self.rows * self.cols

    @property
    def pooled_shape(self) -> tuple[int, int]:
        """Pooled features (rows, columns) of the whole grid."""
        return (
            (self.rows * WINDOW + 2 * MARGIN) // 2,
            (self.cols * WINDOW + 2 * MARGIN) // 2,
        )

    @property
    def pixel_shape(self) -> tuple[int, int]:
        """Height and width in pixels of the canvas that the crops are cut from."""
        return self.rows * STRIDE + TOTAL_MARGIN, self.cols * STRIDE + TOTAL_MARGIN

    @property
    def n_tokens(self) -> int:
        """Image tokens in the prompt: both views, with starts, ends and columns."""
        height, width = self.pooled_shape
        return 2 + POOLED * (POOLED + 1) + 2 + height * (width + 1)

    def tokens(self, ids: ImageTokenIds) -> npt.NDArray[np.int64]:
        """Image tokens, (n_tokens,) int64: the global view, then the grid."""
        parts: list[npt.NDArray[np.int64]] = []
        for height, width in ((POOLED, POOLED), self.pooled_shape):
            view = np.full((height, width + 1), ids.patch, dtype=np.int64)
            view[:, -1] = ids.col
            parts += [np.array([ids.start]), view.reshape(-1), np.array([ids.end])]
        return np.concatenate(parts)

    @cached_property
    def input_idx(self) -> npt.NDArray[np.int32]:
        """Place among the image tokens of each pooled feature, (n_crops + 1, 144) int32.

        The global view first, then crops row by row; -100 where a feature is dropped because a
        neighbour covers it. Add the tokens before the picture (one, the BOS) to get positions.
        """
        height, width = self.pooled_shape
        first = 1 + POOLED * (POOLED + 1) + 2
        grid = first + np.arange(height * (width + 1)).reshape(height, width + 1)[:, :-1]
        out = np.full((self.n_crops + 1, POOLED, POOLED), -100, dtype=np.int32)
        out[0] = 1 + np.arange(POOLED * (POOLED + 1)).reshape(POOLED, POOLED + 1)[:, :-1]
        for r in range(self.rows):
            top, bottom = _kept(r, self.rows)
            for c in range(self.cols):
                left, right = _kept(c, self.cols)
                y, x = r * WINDOW // 2, c * WINDOW // 2
                out[1 + r * self.cols + c, top:bottom, left:right] = grid[
                    y + top : y + bottom, x + left : x + right
                ]
        return out.reshape(self.n_crops + 1, POOLED * POOLED)


def _kept(index: int, count: int) -> tuple[int, int]:
    """Pooled rows (or columns) that crop `index` of `count` keeps: inner edges lose two."""
    return (
        0 if index == 0 else MARGIN // 2,
        POOLED if index == count - 1 else POOLED - MARGIN // 2,
    )


@lru_cache(maxsize=256)
def layout_of(rows: int, cols: int) -> Layout:
    """The (cached) layout of a tiling."""
    return Layout(rows, cols)


def layout_for(height: int, width: int, max_crops: int = DEFAULT_MAX_CROPS) -> Layout:
    """The layout of a picture of `height` × `width` pixels."""
    return layout_of(*select_tiling(height, width, max_crops))


@lru_cache(maxsize=64)
def largest_layout(max_crops: int) -> Layout:
    """The layout with the most image tokens for `max_crops`."""
    return max(
        (layout_of(int(r), int(c)) for r, c in _candidates(max_crops)), key=lambda lay: lay.n_tokens
    )


def fit(height: int, width: int, into: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height, width of a picture scaled to fit into a canvas, centred.

    Scale and products in float32 and truncated, as the reference does; at least one pixel a side.
    """
    scale = min(
        np.float32(into[0]) / np.float32(height), np.float32(into[1]) / np.float32(width)
    )
    new_h = max(1, int(np.float32(height) * scale))
    new_w = max(1, int(np.float32(width) * scale))
    return (into[0] - new_h) // 2, (into[1] - new_w) // 2, new_h, new_w
