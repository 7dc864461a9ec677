"""Molmo 2's pixels: RGB images and video frames to normalised patches.

Bilinear without antialias, rounded to 8 bits, mean and deviation 0.5, as in AllenAI's molmo2 code.
Compiled for this CPU with numba: to the same bits as torch's kernel, because products and sums come
in the same order and are fused alike. Without numba, torch's kernel resizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from molmo_edge.models.compiled import MAX_THREADS, compiled_kernel, row_ranges, run_in_threads
from molmo_edge.models.molmo2.tiling import Geometry, Tiling

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.uint32]
Pixels = npt.NDArray[np.uint8]


def image_patches(pixels: Pixels, tiling: Tiling, *, compiled: bool = True) -> torch.Tensor:
    """Convert one RGB image, (h, w, 3) uint8, to normalised patches.

    Returns (n_crops, n_patches, patch_px² · 3) float32: the global view, then the tiles; patches
    row-major, values of a patch in (row, column, channel) order. Without `compiled`, or numba,
    torch does it, several times slower.
    """
    whole = Tiling(tiling.geometry, 1, 1)
    return _patches([(pixels, whole), (pixels, tiling)], tiling.geometry, compiled)


def frame_patches(
    frames: Sequence[Pixels], geometry: Geometry, *, compiled: bool = True
) -> torch.Tensor:
    """Convert RGB frames, (h, w, 3) uint8 each, to (n, n_patches, patch_px² · 3) float32.

    One crop per frame; values and `compiled` as for `image_patches`.
    """
    whole = Tiling(geometry, 1, 1)
    return _patches([(frame, whole) for frame in frames], geometry, compiled)


def _patches(
    views: Sequence[tuple[Pixels, Tiling]], geometry: Geometry, compiled: bool
) -> torch.Tensor:
    """The patches of the tiles of every view (without its global view), one after the other."""
    counts = [tiling.rows * tiling.cols for _, tiling in views]
    out = torch.empty((sum(counts), geometry.n_patches, geometry.patch_px**2 * 3))
    outputs = out.split(counts)
    kernel = compiled_kernel(_resize_rows) if compiled else None
    if kernel is None:
        for (pixels, tiling), part in zip(views, outputs, strict=True):
            _resize_by_torch(pixels, tiling, part)
        return out
    threads = min(torch.get_num_threads(), MAX_THREADS)
    parts = -(-4 * threads // len(views))
    calls = []
    for (pixels, tiling), part in zip(views, outputs, strict=True):
        height, width = (n * geometry.patch_px for n in tiling.patches)
        source = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
        taps = *_taps(pixels.shape[0], height, 1), *_taps(pixels.shape[1], width, 3)
        place = tiling.cols, geometry.stride_patches, geometry.crop_patches, geometry.patch_px
        calls += [
            (source, *taps, *place, *rows, part.numpy()) for rows in row_ranges(height, parts)
        ]
    run_in_threads(kernel, calls, threads)
    return out


def _resize_by_torch(pixels: Pixels, tiling: Tiling, out: torch.Tensor) -> None:
    geometry = tiling.geometry
    size = tuple(n * geometry.patch_px for n in tiling.patches)
    # Of four channels, last in memory, torch sums in the same order with any number of threads.
    source = torch.zeros((*pixels.shape[:2], 4))
    source.numpy()[..., :3] = pixels
    scaled = F.interpolate(source.permute(2, 0, 1).unsqueeze(0), size=size, mode="bilinear")
    values = scaled[0, :3].round_().div_(255).sub_(0.5).div_(0.5).permute(1, 2, 0)
    crop, patch = geometry.crop_px, geometry.patch_px
    stride, side = geometry.stride_patches * patch, geometry.crop_patches
    tiles = values.unfold(0, crop, stride).unfold(1, crop, stride)  # (rows, cols, 3, crop, crop)
    cut = tiles.unflatten(4, (side, patch)).unflatten(3, (side, patch))
    out.view(-1, side, side, patch, patch, 3).copy_(cut.permute(0, 1, 3, 5, 4, 6, 2).flatten(0, 1))


# A camera's images are all of one size.
@lru_cache(maxsize=16)
def _taps(size: int, new_size: int, channels: int) -> tuple[Indices, Floats]:
    """Both source indices and weights of each output, (2, new_size * channels)."""
    index = np.arange(new_size, dtype=np.int64)
    if size == new_size:
        near, fraction = index, np.zeros(new_size, np.float32)
    else:
        # Torch's float32 scale and one rounding of the position, as of its fused multiply-add.
        scale = np.float32(size) / np.float32(new_size)
        centre = (np.float64(scale) * (index + 0.5) - 0.5).astype(np.float32)
        centre = np.maximum(centre, np.float32(0))
        near = np.minimum(centre.astype(np.int64), size - 1)
        fraction = np.minimum(centre - near.astype(np.float32), np.float32(1))
    pixels = np.stack([near, np.minimum(near + 1, size - 1)])[..., None]
    indices = (pixels * channels + np.arange(channels)).reshape(2, -1)
    weights = np.stack([np.float32(1) - fraction, fraction])
    return indices.astype(np.uint32), weights.repeat(channels, axis=1)


def _resize_rows(
    source: Pixels,
    down: Indices,
    down_weights: Floats,
    across: Indices,
    across_weights: Floats,
    cols: int,
    stride: int,
    side: int,
    patch_px: int,
    begin: int,
    end: int,
    out: Floats,
) -> None:
    """Rows `begin` to `end` of one resized view, written to every tile that shows them; compiled.

    `stride` and `side` are patches from one tile to the next and along a tile.
    """
    size = across.shape[1]
    # Left and right neighbours of every value in two source rows, an even and an odd one.
    near = np.empty((2, size), np.uint8)
    far = np.empty((2, size), np.uint8)
    held = np.array([-1, -1])
    values = np.empty(size, np.float32)
    for y in range(begin, end):
        for row in (down[0, y], down[1, y]):
            if held[row % 2] != row:
                held[row % 2] = row
                pixels = source[row]
                for line, index in ((near[row % 2], across[0]), (far[row % 2], across[1])):
                    for x in range(size):
                        line[x] = pixels[index[x]]
        above, below = down[0, y] % 2, down[1, y] % 2
        upper, lower = down_weights[0, y], down_weights[1, y]
        for x in range(size):
            left, right = across_weights[0, x], across_weights[1, x]
            level = (
                upper * left * np.float32(near[above, x])
                + upper * right * np.float32(far[above, x])
                + lower * left * np.float32(near[below, x])
                + lower * right * np.float32(far[below, x])
            )
            values[x] = (np.rint(level) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
        run = patch_px * 3
        inner = y % patch_px * run
        for tile_row in range(len(out) // cols):
            patch_row = y // patch_px - tile_row * stride
            if 0 <= patch_row < side:
                for tile_col in range(cols):
                    for patch_col in range(side):
                        tile, patch = tile_row * cols + tile_col, patch_row * side + patch_col
                        start = (tile_col * stride + patch_col) * run
                        # Views: indices in the inner loop would double the time of the whole.
                        line, part = out[tile, patch, inner:], values[start : start + run]
                        for x in range(run):
                            line[x] = part[x]
