"""Tilings, pooling windows and, bit for bit, patches are those of AllenAI's molmo2 code."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from molmo_edge.models.molmo2.image_processor import frame_patches, image_patches
from molmo_edge.models.molmo2.tiling import Geometry
from molmo_edge.reference.molmo2_inputs import resize
from tests.molmo2_golden import cases, golden, image, video

GEOMETRY = Geometry()
SIZES = [{"max_crops": 8, **case} for kind in ("images", "crops") for case in golden("extra")[kind]]
WITH_VISUALS = [case for case in cases("qwen3") if {"images", "video"} & case.keys()]


def patches_of(pixels: np.ndarray, **options: Any) -> torch.Tensor:
    return image_patches(pixels, GEOMETRY.tiling(*pixels.shape[:2], 8), **options)


def digest(patches: torch.Tensor) -> str:
    return hashlib.sha256(patches.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("case", golden("extra")["images"], ids=lambda case: str(case["size"]))
def test_every_recorded_image_has_the_reference_patches(
    case: dict[str, Any], compiled: bool
) -> None:
    pixels = image(case["seed"], *case["size"])
    assert digest(patches_of(pixels, compiled=compiled)) == case["pixel_sha"]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("case", WITH_VISUALS, ids=lambda case: case["name"])
def test_the_images_and_frames_of_the_recorded_requests_have_the_reference_patches(
    case: dict[str, Any], compiled: bool
) -> None:
    if "video" in case:
        patches = frame_patches(video(*case["video"][:4]), GEOMETRY, compiled=compiled)
    else:
        images = [patches_of(image(*one), compiled=compiled) for one in case["images"]]
        patches = torch.cat(images)
    recorded = case["pixel_values_videos" if "video" in case else "pixel_values"]
    assert digest(patches) == recorded["sha256_16"]


def plain(pixels: np.ndarray, geometry: Geometry) -> torch.Tensor:
    """One frame as the reference implementation takes it, (n_patches, values)."""
    levels = torch.from_numpy(resize(pixels, geometry.crop_px, geometry.crop_px))
    values = (levels.to(torch.float32) / 255 - 0.5) / 0.5
    side, patch = geometry.crop_patches, geometry.patch_px
    patches = values.reshape(side, patch, side, patch, 3).transpose(1, 2)
    return patches.reshape(geometry.n_patches, -1)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(st.integers(1, 1200), st.integers(1, 1200), st.sampled_from([126, 378]))
@example(1, 1, 378)
@example(1, 777, 378)
@example(777, 1, 378)
@example(2, 9000, 126)
@example(9000, 3, 126)
@example(378, 377, 378)
def test_any_size_equals_the_reference(height: int, width: int, crop_px: int) -> None:
    geometry = Geometry(crop_px=crop_px)
    rng = np.random.default_rng(height * 31 + width)
    # Mirrored: the memory of an image need not be in order.
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)[:, ::-1]
    expected = plain(pixels, geometry)
    assert torch.equal(frame_patches([pixels], geometry)[0], expected)
    assert torch.equal(frame_patches([pixels], geometry, compiled=False)[0], expected)


def test_frames_of_different_sizes_and_threads_give_the_patches_of_each() -> None:
    frames = [image(seed, 90 + 40 * seed, 200 - 30 * seed) for seed in range(5)]
    alone = torch.cat([frame_patches([frame], GEOMETRY) for frame in frames])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = [
            frame_patches(frames, GEOMETRY, compiled=compiled) for compiled in (True, False)
        ]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together[0], alone)
    assert torch.equal(together[1], alone)


@pytest.mark.parametrize("case", SIZES, ids=lambda case: f"{case['size']}-{case['max_crops']}")
def test_every_recorded_size_has_the_reference_tiling(case: dict[str, Any]) -> None:
    width, height = case["size"]
    tiling = GEOMETRY.tiling(height, width, case["max_crops"])
    assert [*tiling.base_grid, *tiling.grid] == case["grid"]
    assert tiling.n_crops == case["crops"]
    assert len(tiling.pooling) == np.prod(tiling.base_grid) + np.prod(tiling.grid)
    if "pooling_sha" in case:
        assert digest(torch.from_numpy(tiling.pooling)) == case["pooling_sha"]


def test_every_patch_of_a_frame_is_in_one_window() -> None:
    assert GEOMETRY.frame_grid == (9, 9)
    assert GEOMETRY.frame_pooling[1].tolist() == [3, 4, 5, 30, 31, 32, 57, 58, 59]
    assert sorted(GEOMETRY.frame_pooling.reshape(-1)) == list(range(729))


def test_crops_of_another_size_are_pooled_as_well() -> None:
    # 9 × 9 patches, tiles 5 apart: 14 × 14 patches; the odd global view is padded at its far edge.
    tiling = Geometry(crop_px=126, margin_patches=(2, 2)).tiling(500, 500, 4)
    assert (tiling.rows, tiling.cols, tiling.base_grid, tiling.grid) == (2, 2, (5, 5), (7, 7))
    assert tiling.pooling[4].tolist() == [8, -1, 17, -1]
