"""Tilings of an image by overlapping crops, chosen as AllenAI's code for Molmo 1 and 2 chooses."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=64)
def candidates(max_crops: int) -> npt.NDArray[np.int32]:
    """All (rows, columns) of at most `max_crops` crops, (n, 2) int32.

    Small first: argmin and argmax favour those.
    """
    pairs = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    return np.array(sorted(pairs, key=lambda p: (p[0] * p[1], p[0])), dtype=np.int32)


def best_tiling(
    height: int, width: int, max_crops: int, stride_px: int, overlap_px: int
) -> tuple[int, int]:
    """Return the rows and columns of crops for an image of `height` × `width` pixels.

    The smallest upscaling that covers the image, else the smallest downscaling. Images of
    `overlap_px` or less on a side give infinite or negative scales, which pick as the reference
    does. `stride_px` is the step from one crop to the next.
    """
    tilings = candidates(max_crops)
    size = np.array([height - overlap_px, width - overlap_px], dtype=np.float32)
    with np.errstate(divide="ignore"):
        scale = ((tilings * stride_px).astype(np.float32) / size).min(axis=-1)
    if np.all(scale < 1):
        best = np.argmax(scale)
    else:
        best = np.argmin(np.where(scale < 1.0, np.float32(10e9), scale))
    rows, cols = tilings[best].tolist()
    return rows, cols
