"""Preprocessing equals the reference's: indices, masks and tokens exactly, pixels within 1e-3."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
import threading
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
from molmo_edge.models.molmo import resize
from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
from molmo_edge.models.molmo.prompts import ImageTokenIds
from molmo_edge.models.molmo.tiling import Tiling
from molmo_edge.reference import molmo as reference

IDS = ImageTokenIds(start=1, end=2, patch=3, col=4)
SPECIAL = reference.SpecialTokens(1, 2, 3, 4)
PIXEL_BOUND = 1e-3
needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason='needs the extra "tf"'
)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shapes with noise, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = 127 + 100 * np.sin(x[..., None] / [7, 19, 45] + y[..., None] / [11, 31, 5])
    return np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)


def assert_equals_reference(image: np.ndarray, max_crops: int) -> None:
    ours = MolmoImageProcessor(max_crops=max_crops).inputs(image)
    slow = reference.preprocess(image, SPECIAL, max_crops)
    assert ours.tiling.tokens(IDS).tolist() == slow.image_tokens.tolist()
    idx = ours.tiling.input_idx
    assert np.array_equal(np.where(idx < 0, idx, idx + 1), slow.image_input_idx)
    assert np.array_equal(ours.image_masks.numpy(), slow.image_masks)
    assert ours.images.shape == slow.images.shape
    assert float(np.abs(ours.images.numpy() - slow.images).max()) <= PIXEL_BOUND


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
@pytest.mark.parametrize(
    "size", [(3000, 4000), (4000, 300), (200, 4000), (1080, 1920), (2890, 4), (4, 2890)]
)
def test_large_and_narrow_images_equal_the_reference(size: tuple[int, int]) -> None:
    assert_equals_reference(photo(*size), 12)


def test_every_tiling_equals_the_reference() -> None:
    for rows in range(1, 13):
        for cols in range(1, 12 // rows + 1):
            height, width = Tiling(rows, cols).canvas_px
            # A quarter of the canvas, so that the tiling is not met exactly.
            assert_equals_reference(photo(height // 2, width // 2, rows), rows * cols)


@needs_tensorflow
@pytest.mark.slow
# TensorFlow's own imports warn.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (57, 300), (1, 1), (700, 90)])
def test_torch_resizes_as_tensorflow_does(size: tuple[int, int]) -> None:
    image = photo(*size)
    ours = MolmoImageProcessor().inputs(image)
    trained = MolmoImageProcessor(resize="tensorflow").inputs(image)
    assert float((ours.images - trained.images).abs().max()) <= PIXEL_BOUND
    assert bool((ours.image_masks == trained.image_masks).all())


def test_pil_and_array_give_the_same() -> None:
    image = photo(120, 80)
    a = MolmoImageProcessor().inputs(image)
    b = MolmoImageProcessor().inputs(Image.fromarray(image))
    assert bool((a.images == b.images).all())


def test_the_callers_array_is_left_alone() -> None:
    image = photo(120, 80)
    before = image.copy()
    image.flags.writeable = False
    MolmoImageProcessor().inputs(image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        "photo.jpg",
    ],
)
def test_what_is_no_image_is_refused(wrong: Any) -> None:
    with pytest.raises(ImageError):
        MolmoImageProcessor().inputs(wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"max_crops": 0},
        {"max_crops": True},
        {"resize": "bicubic"},
        {"image_patch_size": 16},
        {"overlap_margins": [2, 2]},
    ],
)
def test_options_the_model_was_not_made_for_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MolmoImageProcessor(**options)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    image = photo(700, 900)
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(MolmoImageProcessor().inputs(image).images)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_many_threads_at_once_disturb_nobody() -> None:
    images = [photo(120 + 40 * i, 300 - 30 * i, i) for i in range(6)]
    processor = MolmoImageProcessor()
    alone = [processor.inputs(image).images for image in images]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(processor.inputs, images * 3))
    for i, made in enumerate(together):
        assert torch.equal(made.images, alone[i % 6])


def test_no_thread_outlives_a_photo() -> None:
    before = set(threading.enumerate())
    MolmoImageProcessor().inputs(photo(700, 900))
    assert set(threading.enumerate()) == before


def test_an_error_in_a_helping_thread_reaches_the_caller() -> None:
    caller = threading.current_thread()
    ready = threading.Barrier(2, timeout=10)

    def work(job: int) -> None:
        ready.wait()
        if threading.current_thread() is not caller:
            raise ValueError("from the helper")

    with pytest.raises(ValueError, match="from the helper"):
        resize._share(work, [(0,), (1,)], 2)


def test_without_the_compiler_torch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo(480, 333)
    compiled = MolmoImageProcessor().inputs(image).images
    monkeypatch.setattr(resize, "_kernel", [None])
    assert not resize.available()
    assert float((MolmoImageProcessor().inputs(image).images - compiled).abs().max()) <= PIXEL_BOUND


def test_arrays_of_any_strides_are_taken() -> None:
    image = photo(90, 120)
    mirrored = MolmoImageProcessor().inputs(image[:, ::-1]).images
    copied = MolmoImageProcessor().inputs(np.ascontiguousarray(image[:, ::-1])).images
    assert torch.equal(mirrored, copied)


@pytest.mark.slow
def test_memory_is_the_output_and_two_resized_images_at_most() -> None:
    """In a process of its own, whose high-water mark is reset before the image."""
    peak_path = Path("/proc/self/clear_refs")
    if not peak_path.exists():
        pytest.skip("needs Linux's /proc")
    script = textwrap.dedent("""
        import numpy as np, pathlib
        from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
        def kb(name):
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            return int(next(l for l in lines if l.startswith(name)).split()[1])
        image = np.full((3000, 4000, 3), 127, np.uint8)
        processor = MolmoImageProcessor()
        processor.inputs(image[:300, :400])
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = kb("VmRSS")
        made = processor.inputs(image)
        height, width = made.tiling.canvas_px
        print((kb("VmHWM") - before) * 1024, made.images.nbytes, height * width * 3 * 4)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=240
    )
    grown, output, resized = map(int, done.stdout.split())
    assert grown <= output + 2 * resized
