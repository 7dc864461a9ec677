"""Preprocessing equals the reference's: indices, masks and tokens exactly, pixels within 1e-3."""

from __future__ import annotations

import importlib.util
import shutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo_edge.errors import ConfigError, ImageError
from molmo_edge.models.compiled import compiled_kernel
from molmo_edge.models.molmo.image_processor import MolmoImageProcessor, processor_of
from molmo_edge.models.molmo.prompts import ImageTokenIds
from molmo_edge.models.molmo.tiling import Tiling, largest_tiling, tiling_for
from molmo_edge.models.molmo2.image_processor import image_patches
from molmo_edge.models.molmo2.tiling import Geometry
from molmo_edge.reference.molmo_inputs import preprocess, select_tiling

IDS = ImageTokenIds(start=1, end=2, patch=3, col=4)
PIXEL_BOUND = 1e-3


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shapes with noise, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = 127 + 100 * np.sin(x[..., None] / [7, 19, 45] + y[..., None] / [11, 31, 5])
    return np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)


def patches(image: Any, **options: Any) -> torch.Tensor:
    return MolmoImageProcessor(**options).inputs(image).images


def assert_equals_reference(image: np.ndarray, max_crops: int) -> None:
    ours = MolmoImageProcessor(max_crops=max_crops).inputs(image)
    expected = preprocess(image, IDS, max_crops)
    assert ours.tiling.tokens(IDS).tolist() == expected.image_tokens.tolist()
    assert ours.tiling.n_tokens == len(expected.image_tokens)
    idx = ours.tiling.input_idx
    assert np.array_equal(np.where(idx < 0, idx, idx + 1), expected.image_input_idx)
    assert np.array_equal(ours.image_masks.numpy(), expected.image_masks)
    assert ours.images.shape == expected.images.shape
    assert float(np.abs(ours.images.numpy() - expected.images).max()) <= PIXEL_BOUND


@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([1, 2, 6, 12]))
@example(1, 1, 12)
@example(112, 112, 12)
@example(1, 900, 12)
@example(900, 1, 12)
@example(233, 1, 12)
def test_any_size_equals_the_reference(height: int, width: int, max_crops: int) -> None:
    assert_equals_reference(photo(height, width, height * 31 + width), max_crops)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(3000, 4000), (2890, 4)])
def test_large_and_narrow_images_equal_the_reference(size: tuple[int, int]) -> None:
    assert_equals_reference(photo(*size), 12)


def test_every_tiling_equals_the_reference() -> None:
    for rows in range(1, 13):
        for cols in range(1, 12 // rows + 1):
            height, width = Tiling(rows, cols).canvas_px
            # A quarter of the canvas, so that the tiling is not met exactly.
            assert_equals_reference(photo(height // 2, width // 2, rows), rows * cols)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 32))
@example(112, 112, 12)
@example(112, 500, 12)
@example(113, 5, 12)
def test_tilings_are_the_references(height: int, width: int, max_crops: int) -> None:
    expected = Tiling(*select_tiling(height, width, max_crops))
    assert tiling_for(height, width, max_crops) == expected


def test_the_largest_tiling_has_the_most_tokens() -> None:
    # One column of twelve: 2 + 156 + 2 + 100 x 13.
    assert largest_tiling(12).n_tokens == 1460


@pytest.mark.parametrize("size", [(480, 640), (57, 300), (1, 1), (700, 1)])
def test_without_numba_torch_gives_the_same(size: tuple[int, int]) -> None:
    image = photo(*size)
    plain = MolmoImageProcessor().inputs(image, compiled=False).images
    assert float((patches(image) - plain).abs().max()) <= PIXEL_BOUND


def add_one(values: np.ndarray) -> None:
    for i in range(len(values)):
        values[i] += 1


@pytest.mark.parametrize("fault", ["damaged", "full"])
def test_a_cache_of_numba_that_fails_costs_time_alone(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("numba.config.CACHE_DIR", str(cache))
    for _ in range(2):
        kernel = compiled_kernel.__wrapped__(add_one)
        if fault == "full":
            shutil.rmtree(cache)
            cache.write_text("no directory")
        values = np.zeros(3)
        kernel(values)
        assert values.tolist() == [1, 1, 1]
        for file in cache.rglob("*.nbi"):
            file.write_bytes(b"")
        if fault == "full":
            cache.unlink()


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason='needs the extra "tf"')
@pytest.mark.slow
# TensorFlow's own imports warn.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (57, 300), (1, 1), (700, 90)])
def test_our_resize_equals_tensorflows(size: tuple[int, int]) -> None:
    image = photo(*size)
    trained = patches(image, resize="tensorflow")
    assert float((patches(image) - trained).abs().max()) <= PIXEL_BOUND


def test_pil_images_and_arrays_of_any_strides_give_the_same_and_stay_as_they_are() -> None:
    image = photo(120, 80)
    image.flags.writeable = False
    before, expected = image.copy(), patches(image)
    assert torch.equal(patches(Image.fromarray(image)), expected)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    for compiled in (True, False):
        again = MolmoImageProcessor().inputs(mirrored[:, ::-1], compiled=compiled).images
        assert float((again - expected).abs().max()) <= (0 if compiled else PIXEL_BOUND)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        "photo.jpg",
    ],
)
def test_other_inputs_are_refused(wrong: Any) -> None:
    with pytest.raises(ImageError):
        patches(wrong)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"max_crops": 0}, {}),
        ({"max_crops": True}, {}),
        ({"image_patch_size": 16}, {}),
        ({"overlap_margins": [2, 2]}, {}),
        ({"image_mean": [0.5, 0.5, 0.5]}, {}),
        ({}, {"resize": "bicubic"}),
    ],
)
def test_options_the_model_was_not_made_for_are_refused(
    config: dict[str, Any], options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        processor_of(config, **options)


def test_concurrent_calls_are_independent_and_leave_no_thread() -> None:
    before = set(threading.enumerate())
    images = [photo(120 + 40 * i, 300 - 30 * i, i) for i in range(6)]
    alone = [patches(image) for image in images]
    assert set(threading.enumerate()) == before
    with ThreadPoolExecutor(6) as pool:
        for i, result in enumerate(pool.map(patches, images * 3)):
            assert torch.equal(result, alone[i % 6])


def test_nothing_that_grows_with_a_side_outlives_an_image() -> None:
    molmo, geometry = MolmoImageProcessor(max_crops=1), Geometry()

    def process(height: int) -> None:
        pixels = np.zeros((height, 2, 3), np.uint8)
        molmo.inputs(pixels)
        image_patches(pixels, geometry.tiling(height, 2, 1))

    process(100)  # compiles
    tracemalloc.start()
    for height in range(65_532, 65_535):
        process(height)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2**19
