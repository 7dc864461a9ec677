"""Molmo 2's pixels: RGB images and video frames to normalised patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from molmo_edge.models.molmo2.tiling import Geometry, Tiling

Pixels = npt.NDArray[np.uint8]


def image_patches(pixels: Pixels, tiling: Tiling, *, compiled: bool = True) -> torch.Tensor:
    """Normalised patches of one image, (n_crops, n_patches, patch_px² · 3) float32."""
    geometry = tiling.geometry
    side, stride = geometry.crop_px, geometry.stride_patches * geometry.patch_px
    scaled = _scaled(pixels, *(n * geometry.patch_px for n in tiling.patches))
    tiles = [
        scaled[row * stride : row * stride + side, col * stride : col * stride + side]
        for row in range(tiling.rows)
        for col in range(tiling.cols)
    ]
    return torch.stack([_cut(x, geometry) for x in (_scaled(pixels, side, side), *tiles)])


def frame_patches(
    frames: Sequence[Pixels], geometry: Geometry, *, compiled: bool = True
) -> torch.Tensor:
    """Normalised patches of frames, (n, n_patches, patch_px² · 3) float32."""
    side = geometry.crop_px
    return torch.stack([_cut(_scaled(frame, side, side), geometry) for frame in frames])


def _scaled(pixels: Pixels, height: int, width: int) -> torch.Tensor:
    image = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))
    image = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]
    return torch.round(image).to(torch.uint8).permute(1, 2, 0).float() / 255


def _cut(image: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    n, px = geometry.crop_patches, geometry.patch_px
    patches = ((image - 0.5) / 0.5).reshape(n, px, n, px, 3).permute(0, 2, 1, 3, 4)
    return patches.reshape(n * n, px * px * 3)
