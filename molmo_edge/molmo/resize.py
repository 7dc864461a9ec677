"""A picture to normalised patches in one pass: bilinear with antialias, compiled for this CPU.

The triangle filter of TensorFlow and torch, row by row: one row of the scaled picture is filtered
from the 8-bit rows it covers, and goes from a buffer of one line to every crop that shows it. No
float picture and no canvas is ever laid out. The compiler is numba, which vLLM brings. Knows
nothing about how tilings are chosen, or about tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

PATCH = 14
GRID = 24  # patches along a crop
STRIDE = 16  # patches from one crop to the next
# More threads gain little, and each costs as much to start as some rows to filter.
MOST_THREADS = 8


@dataclass(frozen=True)
class View:
    """A picture scaled into a canvas that is cut into crops; all in pixels, but `rows`, `cols`.

    Attributes:
        rows, cols: crops of 336 × 336, one every 224.
        top, left, height, width: where the scaled picture lies in the canvas; the rest is padding.
    """

    rows: int
    cols: int
    top: int
    left: int
    height: int
    width: int


def write_patches(
    pixels: Pixels,
    views: Sequence[tuple[View, Floats]],
    mean: Sequence[float],
    std: Sequence[float],
    threads: int,
) -> None:
    """Scales one picture, (h, w, 3) uint8, into every view and writes its normalised patches.

    Each view comes with its output, (rows * cols, 576, 588) float32, C-contiguous: patches in
    row-major order, values in (row, column, channel) order, (x / 255 - mean) / std, padding as 0.

    Safe to call from many threads at once; the result does not depend on `threads`.
    """
    kernel = _compiled()
    height, width = pixels.shape[:2]
    source = np.ascontiguousarray(pixels).reshape(height, width * 3)
    gain = (1 / (255 * np.asarray(std))).astype(np.float32)
    offset = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)
    jobs: list[tuple[Any, ...]] = []
    for view, out in views:
        down, across = _taps(height, view.height), _taps(width, view.width)
        lines = (view.rows * STRIDE + GRID - STRIDE) * PATCH
        # Few and even: a job is one call, and a call has to come by the interpreter's lock.
        step = -(-lines // (2 * threads if lines > GRID * PATCH else threads))
        jobs += [
            (source, *down, *across, gain, offset, view.top, view.left, view.cols, first,
             min(first + step, lines), out)
            for first in range(0, lines, step)
        ]  # fmt: skip
    _share(kernel, jobs, min(threads, MOST_THREADS))


def _share(work: Callable[..., None], jobs: Sequence[tuple[Any, ...]], threads: int) -> None:
    """Runs all jobs in this thread and in others that live no longer than this call."""
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


# A camera's pictures are all of one size.
@lru_cache(maxsize=16)
def _taps(size: int, new_size: int) -> tuple[Ints, Floats]:
    """The triangle filter from `size` to `new_size`, made wider when shrinking.

    First input of each output, and (new_size, taps) weights that sum to 1; all taps are inside.
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
    return first, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


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
    """Canvas rows `begin` to `end` of one view; compiled, and free of the interpreter's lock."""
    height, width = len(down_first), len(across_first)
    rows = len(out) // cols
    values = source.shape[1]
    line = np.empty(values, np.float32)
    done = np.empty(((cols * STRIDE + GRID - STRIDE) * PATCH, 3), np.float32)
    done[:] = offset
    for y in range(begin, end):
        row = y - top
        if 0 <= row < height:
            for start in range(0, values, 1024):
                part = line[start : start + 1024]
                part[:] = 0.0
                for tap in range(down_weights.shape[1]):
                    weight = down_weights[row, tap]
                    if weight != 0.0:
                        above = source[down_first[row] + tap, start : start + 1024]
                        for x in range(len(part)):
                            part[x] += weight * np.float32(above[x])
            for column in range(width):
                at = 3 * across_first[column]
                red = green = blue = np.float32(0.0)
                for tap in range(across_weights.shape[1]):
                    weight = across_weights[column, tap]
                    red += weight * line[at]
                    green += weight * line[at + 1]
                    blue += weight * line[at + 2]
                    at += 3
                done[left + column, 0] = red * gain[0] + offset[0]
                done[left + column, 1] = green * gain[1] + offset[1]
                done[left + column, 2] = blue * gain[2] + offset[2]
        elif row == height or y == begin:
            done[:] = offset
        flat = done.reshape(-1)
        patch_row, inner = y // PATCH, (y % PATCH) * PATCH * 3
        for crop_row in range(rows):
            at_row = patch_row - crop_row * STRIDE
            if 0 <= at_row < GRID:
                for crop_col in range(cols):
                    crop = out[crop_row * cols + crop_col]
                    for patch_col in range(GRID):
                        start = (crop_col * STRIDE + patch_col) * PATCH * 3
                        target = crop[at_row * GRID + patch_col, inner : inner + PATCH * 3]
                        target[:] = flat[start : start + PATCH * 3]


_lock = threading.Lock()
_kernel: list[Callable[..., None]] = []


def _compiled() -> Callable[..., None]:
    """`_filter_rows` in machine code; from numba's cache on disk after the first time."""
    with _lock:
        if not _kernel:
            import numba

            options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}}
            try:
                made = numba.njit(cache=True, **options)(_filter_rows)
            except RuntimeError:  # no place for a cache
                made = numba.njit(**options)(_filter_rows)
            _kernel.append(made)
    return _kernel[0]
