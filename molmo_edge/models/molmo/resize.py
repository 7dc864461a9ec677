"""Image to normalised patches in one pass: bilinear with antialias, compiled for this CPU.

The triangle filter of TensorFlow and torch, row by row: one row of the scaled image is filtered
from the 8-bit rows it covers, and copied from a buffer of one line to every crop that shows it;
neither a float image nor a canvas is allocated. The first call costs numba's compilation (about a
second, later read from its cache on disk).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from molmo_edge.models.compiled import MAX_THREADS, row_ranges, run_in_threads
from molmo_edge.models.molmo.tiling import (
    CROP_PATCHES,
    OVERLAP_PX,
    PATCH_PX,
    STRIDE_PATCHES,
    STRIDE_PX,
    View,
)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

# CLIP's, from the OpenAI checkpoint that Molmo's tower was started from.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# value * GAIN + OFFSET is (value / 255 - MEAN) / STD.
_GAIN = (1 / (255 * np.asarray(STD))).astype(np.float32)
_OFFSET = (-np.asarray(MEAN) / np.asarray(STD)).astype(np.float32)

CHUNK = 1024  # values of a row that are filtered together: they stay in the L1 cache


def write_patches(
    kernel: Callable[..., None], pixels: Pixels, views: Sequence[tuple[View, Floats]], threads: int
) -> None:
    """Scale one image, (h, w, 3) uint8, into every view and write its normalised patches.

    Each view comes with its output, (rows * cols, 576, 588) float32, C-contiguous: patches in
    row-major order, values in (row, column, channel) order, normalised, padding as 0.

    Safe to call from many threads at once; the result does not depend on `threads`.
    """
    height, width = pixels.shape[:2]
    source = np.ascontiguousarray(pixels).reshape(height, width * 3)
    threads = min(threads, MAX_THREADS)
    calls = []
    for view, out in views:
        taps = *_taps(height, view.height), *_taps(width, view.width)
        place = view.top, view.left, view.cols
        for rows in row_ranges(view.rows * STRIDE_PX + OVERLAP_PX, 2 * threads):
            calls.append((source, *taps, _GAIN, _OFFSET, *place, *rows, out))
    run_in_threads(kernel, calls, threads)


def _taps(size: int, new_size: int) -> tuple[Ints, Floats]:
    """The triangle filter from `size` to `new_size`, made wider when shrinking.

    First input of each output, and (new_size, taps) weights that sum to 1.
    """
    scale = size / new_size
    reach = max(scale, 1.0)
    centre = (np.arange(new_size) + 0.5) * scale
    first = np.maximum(np.floor(centre - reach), 0).astype(np.int64)
    last = np.minimum(np.ceil(centre + reach), size).astype(np.int64)
    taps = int((last - first).max())
    first = np.minimum(first, size - taps)
    distance = np.abs(first[:, None] + np.arange(taps) + 0.5 - centre[:, None])
    weights = np.maximum(1.0 - distance / reach, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return first, weights.astype(np.float32)


def filter_rows(
    source: Pixels,
    down_first: Ints,
    down_weights: Floats,
    across_first: Ints,
    across_weights: Floats,
    gain: Floats,
    offset: Floats,
    top: int,
    left: int,
    cols: int,
    begin: int,
    end: int,
    out: Floats,
) -> None:
    """Canvas rows `begin` to `end` of one view; compiled, and without the interpreter's lock."""
    height, width = len(down_first), len(across_first)
    taps_down, taps_across = down_weights.shape[1], across_weights.shape[1]
    rows, values = len(out) // cols, source.shape[1]
    line = np.empty(values, np.float32)
    scaled = np.empty((cols * STRIDE_PX + OVERLAP_PX, 3), np.float32)
    for y in range(begin, end):
        row = y - top
        if y == begin or row == height:
            for column in range(len(scaled)):
                for channel in range(3):
                    scaled[column, channel] = offset[channel]
        if 0 <= row < height:
            for start in range(0, values, CHUNK):
                part = line[start : start + CHUNK]
                for x in range(len(part)):
                    part[x] = 0.0
                for tap in range(taps_down):
                    weight = down_weights[row, tap]
                    pixels = source[down_first[row] + tap, start : start + CHUNK]
                    for x in range(len(part)):
                        part[x] += weight * np.float32(pixels[x])
            for column in range(width):
                at = 3 * across_first[column]
                red = green = blue = np.float32(0.0)
                for tap in range(taps_across):
                    weight = across_weights[column, tap]
                    red += weight * line[at]
                    green += weight * line[at + 1]
                    blue += weight * line[at + 2]
                    at += 3
                scaled[left + column, 0] = red * gain[0] + offset[0]
                scaled[left + column, 1] = green * gain[1] + offset[1]
                scaled[left + column, 2] = blue * gain[2] + offset[2]
        inner = (y % PATCH_PX) * PATCH_PX
        for crop_row in range(rows):
            at_row = y // PATCH_PX - crop_row * STRIDE_PATCHES
            if 0 <= at_row < CROP_PATCHES:
                for crop_col in range(cols):
                    for patch_col in range(CROP_PATCHES):
                        crop, patch = crop_row * cols + crop_col, at_row * CROP_PATCHES + patch_col
                        start = (crop_col * STRIDE_PATCHES + patch_col) * PATCH_PX
                        for x in range(PATCH_PX):
                            for channel in range(3):
                                out[crop, patch, (inner + x) * 3 + channel] = scaled[
                                    start + x, channel
                                ]
