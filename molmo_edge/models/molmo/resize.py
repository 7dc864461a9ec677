"""Image to normalised patches in one pass: bilinear with antialias, compiled for this CPU.

The triangle filter of TensorFlow and torch, row by row: one row of the scaled image is filtered
from the 8-bit rows it covers, and copied from a buffer of one line to every crop that shows it;
neither a float image nor a canvas is allocated. The first call costs numba's compilation (about a
second, later read from its cache on disk).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo_edge.errors import MissingDependencyError
from molmo_edge.models.molmo.tiling import CROP_PATCHES, PATCH_PX, STRIDE_PATCHES, View

logger = logging.getLogger("molmo_edge")

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

# More threads gain little, and each costs as much to start as some rows to filter.
MAX_THREADS = 8
CHUNK = 1024  # values of a row that are filtered together: they stay in the L1 cache


def write_patches(
    pixels: Pixels,
    views: Sequence[tuple[View, Floats]],
    mean: Sequence[float],
    std: Sequence[float],
    threads: int,
) -> None:
    """Scale one image, (h, w, 3) uint8, into every view and write its normalised patches.

    Each view comes with its output, (rows * cols, 576, 588) float32, C-contiguous: patches in
    row-major order, values in (row, column, channel) order, (x / 255 - mean) / std, padding as 0.

    Safe to call from many threads at once; the result does not depend on `threads`.
    """
    kernel = _compiled()
    if kernel is None:
        raise MissingDependencyError("Compiled resizing needs numba: pip install numba.")
    height, width = pixels.shape[:2]
    source = np.ascontiguousarray(pixels).reshape(height, width * 3)
    gain = (1 / (255 * np.asarray(std))).astype(np.float32)
    offset = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)
    jobs: list[tuple[Any, ...]] = []
    for view, out in views:
        down, across = _taps(height, view.height, 4), _taps(width, view.width, 1)
        lines = (view.rows * STRIDE_PATCHES + CROP_PATCHES - STRIDE_PATCHES) * PATCH_PX
        # Few and even: each job is one call, which needs the interpreter's lock.
        step = -(-lines // (2 * threads if lines > CROP_PATCHES * PATCH_PX else threads))
        for first in range(0, lines, step):
            rows = first, min(first + step, lines)
            place = view.top, view.left, view.cols
            jobs.append((source, *down, *across, gain, offset, *place, *rows, out))
    _share(kernel, jobs, min(threads, MAX_THREADS))


def _share(work: Callable[..., None], jobs: Sequence[tuple[Any, ...]], threads: int) -> None:
    """Run all jobs in this thread and in others that end before this call does."""
    left = iter(jobs)  # one `next` at a time, under the interpreter's lock
    failed: list[BaseException] = []

    def run() -> None:
        try:
            for job in left:
                work(*job)
        except BaseException as exc:
            failed.append(exc)

    helpers = [
        threading.Thread(target=run, name="molmo-edge-resize", daemon=True)
        for _ in range(threads - 1)
    ]
    for helper in helpers:
        helper.start()
    run()
    for helper in helpers:
        helper.join()
    if failed:
        raise failed[0]


# A camera's images are all of one size.
@lru_cache(maxsize=16)
def _taps(size: int, new_size: int, multiple: int) -> tuple[Ints, Floats]:
    """The triangle filter from `size` to `new_size`, made wider when shrinking.

    First input of each output, and (new_size, taps) weights that sum to 1, padded with zeros to a
    `multiple`; taps of weight 0 may lie after the end.
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
    return first, np.pad(weights, ((0, 0), (0, -taps % multiple))).astype(np.float32)


def _filter_rows(
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
    columns = (cols * STRIDE_PATCHES + CROP_PATCHES - STRIDE_PATCHES) * PATCH_PX
    scaled = np.empty((columns, 3), np.float32)
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
                # Four rows at a time: a sum is read and written once for four products.
                for tap in range(0, taps_down, 4):
                    w0, w1 = down_weights[row, tap], down_weights[row, tap + 1]
                    w2, w3 = down_weights[row, tap + 2], down_weights[row, tap + 3]
                    at, end_row = down_first[row] + tap, len(source) - 1
                    s0 = source[min(at, end_row), start : start + CHUNK]
                    s1 = source[min(at + 1, end_row), start : start + CHUNK]
                    s2 = source[min(at + 2, end_row), start : start + CHUNK]
                    s3 = source[min(at + 3, end_row), start : start + CHUNK]
                    for x in range(len(part)):
                        part[x] += (
                            w0 * np.float32(s0[x])
                            + w1 * np.float32(s1[x])
                            + w2 * np.float32(s2[x])
                            + w3 * np.float32(s3[x])
                        )
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


_lock = threading.Lock()
_kernel: list[Callable[..., None] | None] = []


def available() -> bool:
    """Whether `write_patches` works: numba can be imported."""
    return _compiled() is not None


def _compiled() -> Callable[..., None] | None:
    """`_filter_rows` in machine code, None without numba."""
    with _lock:
        if not _kernel:
            _kernel.append(_compile())
    return _kernel[0]


def _compile() -> Callable[..., None] | None:
    try:
        import numba  # type: ignore[import-untyped, unused-ignore]
    except (ImportError, SystemError) as exc:  # missing, or for another numpy
        logger.warning("Without numba, images are resized several times slower (%s).", exc)
        return None
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(_filter_rows)  # type: ignore[no-any-return]
    except RuntimeError:  # no directory for its cache
        return numba.njit(**options)(_filter_rows)  # type: ignore[no-any-return]
