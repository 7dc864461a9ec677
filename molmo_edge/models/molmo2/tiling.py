"""Geometry of Molmo 2 images and frames: which tiling, and which patches are pooled together.

As in AllenAI's molmo2 code. Sizes are (height, width) in pixels, grids (rows, columns). Patches of
an image are numbered crop by crop, row-major inside a crop; crop 0 is the global view, then come
the tiles, row-major.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from molmo_edge.models.tiling import best_tiling

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """What preprocessor_config.json and video_preprocessor_config.json say; hub defaults."""

    crop_px: int = 378  # side of a crop, or frame
    patch_px: int = 14  # side of a patch
    pool: int = 2  # patches along a pooling window of images
    frame_pool: int = 3  # and of frames
    # Overlap that a tile leaves to its neighbours: on the left or top, on the right or bottom.
    margin_patches: tuple[int, int] = (4, 4)

    @property
    def crop_patches(self) -> int:
        """Patches along a crop."""
        return self.crop_px // self.patch_px

    @property
    def n_patches(self) -> int:
        """Patches of a crop."""
        return self.crop_patches**2

    @property
    def stride_patches(self) -> int:
        """Patches from one tile to the next."""
        return self.crop_patches - sum(self.margin_patches)

    def tiling(self, height: int, width: int, max_crops: int) -> Tiling:
        """Return the tiling of an image; `max_crops` does not count the global view."""
        return _tiling(self, height, width, max_crops)

    @property
    def frame_grid(self) -> tuple[int, int]:
        """Pooled rows and columns of one frame of a video."""
        side = _pooled(self.crop_patches, self.frame_pool)
        return side, side

    @cached_property
    def frame_pooling(self) -> Ints:
        """Patches of one frame in each window, (n_pooled, frame_pool**2) int64; -1 is padding."""
        return _windows(_crop(self), self.frame_pool)


@dataclass(frozen=True)
class Tiling:
    """Tiles of one image; the global view comes before them."""

    geometry: Geometry
    rows: int
    cols: int

    @property
    def n_crops(self) -> int:
        """Tiles and the global view."""
        return self.rows * self.cols + 1

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches that the tiles cover together."""
        stride, overlap = self.geometry.stride_patches, sum(self.geometry.margin_patches)
        return self.rows * stride + overlap, self.cols * stride + overlap

    @property
    def base_grid(self) -> tuple[int, int]:
        """Pooled rows and columns of the global view."""
        side = _pooled(self.geometry.crop_patches, self.geometry.pool)
        return side, side

    @property
    def grid(self) -> tuple[int, int]:
        """Pooled rows and columns of the tiles together."""
        height, width = self.patches
        return _pooled(height, self.geometry.pool), _pooled(width, self.geometry.pool)

    @cached_property
    def pooling(self) -> Ints:
        """Patches of the image in each window, (n_pooled, pool**2) int64.

        The windows of the global view, then those of the tiles, row-major; -1 is padding.
        """
        geometry, stride = self.geometry, self.geometry.stride_patches
        y, x = (np.arange(n, dtype=np.int64) for n in self.patches)
        # Inside the overlap, each tile leaves its margin to the neighbour.
        row, col = (
            np.clip((at - geometry.margin_patches[0]) // stride, 0, n - 1)
            for at, n in ((y, self.rows), (x, self.cols))
        )
        tile = 1 + row[:, None] * self.cols + col
        y, x = y - row * stride, x - col * stride
        patches = tile * geometry.n_patches + y[:, None] * geometry.crop_patches + x
        pool = geometry.pool
        return np.concatenate([_windows(_crop(geometry), pool), _windows(patches, pool)])


# A camera's images are all of one size.
@lru_cache(maxsize=64)
def _tiling(geometry: Geometry, height: int, width: int, max_crops: int) -> Tiling:
    stride = geometry.stride_patches * geometry.patch_px
    return Tiling(
        geometry, *best_tiling(height, width, max_crops, stride, geometry.crop_px - stride)
    )


def _pooled(patches: int, pool: int) -> int:
    return -(-patches // pool)


def _crop(geometry: Geometry) -> Ints:
    side = geometry.crop_patches
    return np.arange(geometry.n_patches, dtype=np.int64).reshape(side, side)


def _windows(patches: Ints, pool: int) -> Ints:
    """Cut (rows, columns) into pool × pool windows, padded with -1; mostly at the far edges."""
    missing = [-n % pool for n in patches.shape]
    padding = [(n // 2, n - n // 2) for n in missing]
    padded = np.pad(patches, padding, constant_values=-1)
    rows, cols = (n // pool for n in padded.shape)
    windows = padded.reshape(rows, pool, cols, pool).swapaxes(1, 2)
    return windows.reshape(rows * cols, pool * pool)
