"""Geometry of Molmo 1 images: which tiling, which tokens, which feature goes where.

As in AllenAI's preprocessing code for Molmo-*-0924: integers, and a few float32 divisions. Sizes
are (height, width) in pixels, tilings (rows, columns) of crops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from molmo_edge.models.molmo.prompts import ImageTokenIds
from molmo_edge.models.tiling import best_tiling, candidates

PATCH_PX = 14  # side of one ViT patch
CROP_PX = 336  # side of one crop
CROP_PATCHES = CROP_PX // PATCH_PX  # 24
CROP_FEATURES = CROP_PATCHES // 2  # 12 pooled features along a crop
MARGIN_PATCHES = 4  # shared with each neighbour
STRIDE_PATCHES = CROP_PATCHES - 2 * MARGIN_PATCHES  # 16, from one crop to the next
STRIDE_PX = STRIDE_PATCHES * PATCH_PX  # 224
OVERLAP_PX = CROP_PX - STRIDE_PX  # 112
DEFAULT_MAX_CROPS = 12
MOST_CROPS = 1024  # a checkpoint may name; of an image of a hundred megapixels


class View(NamedTuple):
    """An image scaled into a canvas of rows × cols overlapping crops."""

    rows: int
    cols: int
    # The scaled image in the canvas, pixels; the rest is padding.
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Tiling:
    """Crops of one image, and where their features go; the global view comes on top."""

    rows: int
    cols: int

    @property
    def n_crops(self) -> int:
        return self.rows * self.cols

    @property
    def features(self) -> tuple[int, int]:
        """Pooled features (rows, columns) of the whole grid."""
        height, width = self.canvas_px
        return height // (2 * PATCH_PX), width // (2 * PATCH_PX)

    @property
    def canvas_px(self) -> tuple[int, int]:
        """Height and width in pixels of the canvas that the crops are cut from."""
        return self.rows * STRIDE_PX + OVERLAP_PX, self.cols * STRIDE_PX + OVERLAP_PX

    @property
    def n_tokens(self) -> int:
        """Image tokens in the prompt: both views, with starts, ends and columns."""
        height, width = self.features
        return 2 + CROP_FEATURES * (CROP_FEATURES + 1) + 2 + height * (width + 1)

    def tokens(self, ids: ImageTokenIds) -> npt.NDArray[np.int64]:
        """Image tokens, (n_tokens,) int64: the global view, then the grid."""
        parts: list[npt.NDArray[np.int64]] = []
        for height, width in ((CROP_FEATURES, CROP_FEATURES), self.features):
            view = np.full((height, width + 1), ids.patch, dtype=np.int64)
            view[:, -1] = ids.col
            parts += [np.array([ids.start]), view.reshape(-1), np.array([ids.end])]
        return np.concatenate(parts)

    @cached_property
    def input_idx(self) -> npt.NDArray[np.int32]:
        """Index among the image tokens of each pooled feature, (n_crops + 1, 144) int32.

        The global view first, then crops row by row; -100 where a feature is dropped because a
        neighbour covers it. Add the tokens before the image (one, BOS) to get positions.
        """
        n = CROP_FEATURES
        height, width = self.features
        first = 1 + n * (n + 1) + 2
        grid = first + np.arange(height * (width + 1)).reshape(height, width + 1)[:, :-1]
        out = np.full((self.n_crops + 1, n, n), -100, dtype=np.int32)
        out[0] = 1 + np.arange(n * (n + 1)).reshape(n, n + 1)[:, :-1]
        for r in range(self.rows):
            top, bottom = _kept(r, self.rows)
            for c in range(self.cols):
                left, right = _kept(c, self.cols)
                y, x = r * STRIDE_PATCHES // 2, c * STRIDE_PATCHES // 2
                out[1 + r * self.cols + c, top:bottom, left:right] = grid[
                    y + top : y + bottom, x + left : x + right
                ]
        return out.reshape(self.n_crops + 1, n * n)

    def fit(self, height: int, width: int) -> View:
        """Scale an image to fit into the canvas, centred; at least one pixel a side.

        Scale and products in float32 and truncated, as the reference does.
        """
        canvas = self.canvas_px
        scale = min(
            np.float32(canvas[0]) / np.float32(height), np.float32(canvas[1]) / np.float32(width)
        )
        new_h = max(1, int(np.float32(height) * scale))
        new_w = max(1, int(np.float32(width) * scale))
        top, left = (canvas[0] - new_h) // 2, (canvas[1] - new_w) // 2
        return View(self.rows, self.cols, top, left, new_h, new_w)


def _kept(index: int, count: int) -> tuple[int, int]:
    """Pooled rows (or columns) that crop `index` of `count` keeps: inner edges lose two."""
    return (
        0 if index == 0 else MARGIN_PATCHES // 2,
        CROP_FEATURES if index == count - 1 else CROP_FEATURES - MARGIN_PATCHES // 2,
    )


# A camera's images are all of one size.
@lru_cache(maxsize=256)
def tiling_for(height: int, width: int, max_crops: int = DEFAULT_MAX_CROPS) -> Tiling:
    """Return the tiling of an image of `height` × `width` pixels."""
    return Tiling(*best_tiling(height, width, max_crops, STRIDE_PX, OVERLAP_PX))


@lru_cache(maxsize=64)
def largest_tiling(max_crops: int) -> Tiling:
    """Return the tiling with the most image tokens for `max_crops`."""
    tilings = [Tiling(*pair) for pair in candidates(max_crops).tolist()]
    return max(tilings, key=lambda tiling: tiling.n_tokens)
