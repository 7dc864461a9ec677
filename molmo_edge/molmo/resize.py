"""A picture to patches of several sizes at once: bilinear with antialias, as matrix products.

The triangle filter of TensorFlow and torch is separable. Bands of rows are converted from 8 bits
to float32 once and feed the vertical filter of every view; the horizontal filter then writes whole
columns of patches, so that neither a float picture nor a canvas is ever laid out. Knows nothing
about tilings or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

PATCH = 14
LINE = PATCH * 3  # values in one pixel row of a patch

# Bytes of float32 rows that one step converts, and that wait between the two filters: small enough
# for a core's cache, large enough that the overhead of a call does not show.
BAND_BYTES = 1 << 20
# More rows at once would multiply by more zeros.
BAND_ROWS = 32
WAITING_BYTES = 4 << 20
# Columns of patches in one product.
GROUP = 8


@dataclass(frozen=True)
class Placed:
    """A picture scaled into a canvas, in pixels.

    Attributes:
        canvas_height, canvas_width: multiples of 14.
        top, left, height, width: where the scaled picture lies; the rest is padding.
    """

    canvas_height: int
    canvas_width: int
    top: int
    left: int
    height: int
    width: int


def resize_to_patches(
    pixels: npt.NDArray[np.uint8], views: Sequence[Placed], gain: Sequence[float]
) -> list[torch.Tensor]:
    """Scales one picture, (h, w, 3) uint8, into each view.

    Returns:
        For each view (canvas_width / 14, canvas_height, 42) float32: columns of patches, in each
        the canvas rows, in each (column, channel), so that the 588 values of a patch lie together.
        Values are 0..255 times the channel's `gain`, and 0 in padding.

    Safe to call from many threads at once; the result does not depend on how many torch uses.
    """
    height, width = pixels.shape[:2]
    source = as_tensor(pixels).view(height, width * 3)
    band = min(height, BAND_ROWS, max(8, BAND_BYTES // (width * 12)))
    works = [_View(height, width, view, tuple(gain), band) for view in views]
    floats = torch.empty((band, width * 3))
    for index, start in enumerate(range(0, height, band)):
        rows = floats[: height - start]
        rows.copy_(source[start : start + band])
        for work in works:
            work.feed(index, rows)
    return [work.finished() for work in works]


class _View:
    """One view in the making: rows between the two filters, and the patches done so far."""

    def __init__(
        self, height: int, width: int, view: Placed, gain: tuple[float, ...], band: int
    ) -> None:
        self._view = view
        self._down = _down(height, view.height, band)
        self._across = _across(width, view, gain)
        room = max(self._down.weights.shape[1], WAITING_BYTES // (width * 12))
        edge = self._across.edge
        self._waiting = torch.empty((min(room, view.height), edge[0] + width * 3 + edge[1]))
        # What the padding holds is multiplied by 0, which would not make numbers of NaN.
        self._waiting[:, : edge[0]] = 0
        self._waiting[:, edge[0] + width * 3 :] = 0
        self._inner = self._waiting[:, edge[0] : edge[0] + width * 3]
        # Rows of the scaled picture: written up to `_done`, begun up to `_begun`.
        self._done = self._begun = 0
        self._patches = torch.empty((view.canvas_width // PATCH, view.canvas_height, LINE))
        self._patches[:, : view.top] = 0
        self._patches[:, view.top + view.height :] = 0
        self._patches[: self._across.groups[0].first] = 0
        last = self._across.groups[-1]
        self._patches[last.first + len(last.weights) :] = 0

    def feed(self, index: int, rows: torch.Tensor) -> None:
        """Adds what band `index` of the picture gives to the rows it touches."""
        first, last = self._down.touched[index]
        if last - self._done > len(self._waiting):
            self._write(first)
        self._inner[self._begun - self._done : last - self._done] = 0
        self._begun = last
        weights = self._down.weights[index, : last - first, : len(rows)]
        self._inner[first - self._done : last - self._done].addmm_(weights, rows)

    def finished(self) -> torch.Tensor:
        self._write(self._view.height)
        return self._patches

    def _write(self, last: int) -> None:
        """Filters the rows up to `last` horizontally, and moves the begun ones to the front."""
        count, line = last - self._done, self._waiting.stride(0)
        rows = slice(self._view.top + self._done, self._view.top + last)
        for group in self._across.groups:
            columns, reach = group.weights.shape[:2]
            windows = self._waiting.as_strided(
                (columns, count, reach), (group.step, line, 1), group.start
            )
            out = self._patches[group.first : group.first + columns, rows]
            torch.bmm(windows, group.weights, out=out)
        begun = self._inner[count : self._begun - self._done]
        self._inner[: len(begun)] = begun.clone()
        self._done = last


@dataclass(frozen=True)
class _Down:
    """Vertical filter by bands of input rows.

    Attributes:
        touched: for each band, first and last (exclusive) output row that it gives to.
        weights: (bands, most rows touched, band) float32.
    """

    touched: tuple[tuple[int, int], ...]
    weights: torch.Tensor


@dataclass(frozen=True)
class _Group:
    """Neighbouring columns of patches, whose windows on an input row are evenly spaced.

    Attributes:
        first: the first column of patches.
        start, step: where its window starts in a padded row, and how far apart windows are.
        weights: (columns, window, 42) float32, channels kept apart and multiplied by gain.
    """

    first: int
    start: int
    step: int
    weights: torch.Tensor


@dataclass(frozen=True)
class _Across:
    """Horizontal filter, in groups of columns of patches.

    Attributes:
        edge: values of padding that windows need left and right of an input row.
    """

    groups: tuple[_Group, ...]
    edge: tuple[int, int]


def _taps(
    size: int, new_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The triangle filter from `size` to `new_size`, made wider when shrinking.

    First input and first input behind for each output, and (new_size, most taps) weights that
    sum to 1.
    """
    scale = size / new_size
    reach = max(scale, 1.0)
    centre = (np.arange(new_size) + 0.5) * scale
    first = np.maximum(np.floor(centre - reach), 0).astype(np.int64)
    last = np.minimum(np.ceil(centre + reach), size).astype(np.int64)
    at = first[:, None] + np.arange(int((last - first).max()))
    weights = np.maximum(1.0 - np.abs(at + 0.5 - centre[:, None]) / reach, 0.0)
    weights[at >= last[:, None]] = 0.0
    return first, last, weights / weights.sum(axis=1, keepdims=True)


# A camera's pictures are all of one size; a filter takes a few MB at most.
@lru_cache(maxsize=8)
def _down(size: int, new_size: int, band: int) -> _Down:
    first, last, taps = _taps(size, new_size)
    edges = np.arange(0, size, band)
    touched_first = np.searchsorted(last, edges, side="right")
    touched_last = np.searchsorted(first, np.minimum(edges + band, size), side="left")
    row, tap = np.nonzero(taps)
    at = first[row] + tap
    index = at // band
    weights = np.zeros((len(edges), int((touched_last - touched_first).max()), band), np.float32)
    weights[index, row - touched_first[index], at % band] = taps[row, tap]
    touched = zip(touched_first.tolist(), touched_last.tolist(), strict=True)
    return _Down(tuple(touched), torch.from_numpy(weights))


@lru_cache(maxsize=8)
def _across(size: int, view: Placed, gain: tuple[float, ...]) -> _Across:
    first, last, taps = _taps(size, view.width)
    column = (view.left + np.arange(view.width)) // PATCH
    drawn = []
    for begin in range(column[0], column[-1] + 1, GROUP):
        end = min(begin + GROUP, column[-1] + 1)
        starts = first[np.searchsorted(column, np.arange(begin, end), side="left")]
        ends = last[np.searchsorted(column, np.arange(begin, end), side="right") - 1]
        steps = np.arange(end - begin)
        step = round((starts[-1] - starts[0]) / max(end - begin - 1, 1))
        start = int((starts - steps * step).min())
        reach = int((ends - steps * step).max()) - start
        weights = np.zeros((end - begin, reach, 3, PATCH, 3), np.float32)
        inside = slice(*np.searchsorted(column, [begin, end], side="left"))
        out, tap = np.nonzero(taps[inside])
        out += inside.start
        index = column[out] - begin
        at = first[out] + tap - start - index * step
        for channel in range(3):
            weights[index, at, channel, (view.left + out) % PATCH, channel] = (
                taps[out, tap] * gain[channel]
            )
        drawn.append((begin, start, step, weights.reshape(end - begin, reach * 3, LINE)))
    left = max(0, -min(start for _, start, _, _ in drawn))
    right = max(0, max(s + (len(w) - 1) * d + w.shape[1] // 3 for _, s, d, w in drawn) - size)
    groups = (
        _Group(int(begin), (left + start) * 3, step * 3, torch.from_numpy(weights))
        for begin, start, step, weights in drawn
    )
    return _Across(tuple(groups), (left * 3, right * 3))


def as_tensor(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """The same memory as a tensor that is only read."""
    pixels = np.ascontiguousarray(pixels)
    if not pixels.flags.writeable:
        # Pillow's buffers are read-only; torch warns of those, and a copy would cost.
        pixels = np.asarray(_Writeable(pixels))
    return torch.from_numpy(pixels)


class _Writeable:
    """Hands out an array's memory as writeable, and keeps it alive."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self._array = array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        interface = dict(self._array.__array_interface__)
        return {**interface, "data": (interface["data"][0], False)}
