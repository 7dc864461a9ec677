"""Reference preprocessing against results worked out by hand, and against torch's filter."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_edge.errors import ImageError
from molmo_edge.models.molmo.prompts import ImageTokenIds
from molmo_edge.reference.molmo_inputs import MEAN, STD, preprocess, resize, select_tiling

START, END, PATCH, COL = 900, 901, 902, 903
IDS = ImageTokenIds(START, END, PATCH, COL)
GLOBAL_TOKENS = 1 + 12 * 13 + 1


def noise(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def unnormalise(images: np.ndarray) -> np.ndarray:
    """(views, 576, 588) to (views, 336, 336, 3) in [0, 1]."""
    pixels = images.reshape(-1, 24, 24, 14, 14, 3).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(-1, 336, 336, 3) * STD + MEAN


def torch_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """torch's antialiased bilinear filter in float64."""
    planes = torch.tensor(image, dtype=torch.float64).permute(2, 0, 1)[None]
    # torch 2.13 on CPU repeats the first output row when the output is one column wide; a one-row
    # output is right, so such images are transposed.
    turn = width == 1
    planes, size = (planes.mT.contiguous(), (width, height)) if turn else (planes, (height, width))
    out = torch.nn.functional.interpolate(planes, size=size, mode="bilinear", antialias=True)
    return np.asarray((out.mT if turn else out)[0].permute(1, 2, 0).numpy())


@settings(deadline=None, max_examples=60)
@given(*[st.integers(1, 90)] * 4, st.integers(0, 9))
def test_resize_is_the_antialiased_bilinear_filter(
    h: int, w: int, nh: int, nw: int, seed: int
) -> None:
    image = noise(h, w, seed).astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(resize(image, nh, nw), torch_resize(image, nh, nw), atol=1e-6)
    assert np.array_equal(resize(image, h, w), image)


@pytest.mark.parametrize(
    ("height", "width", "max_crops", "tiling"),
    [
        (1, 1, 12, (1, 1)),  # both scales negative
        (112, 112, 12, (1, 1)),  # both infinite
        (112, 5000, 12, (1, 12)),  # height never limits; the widest row of crops shrinks least
        (50, 5000, 12, (1, 1)),  # negative height scale is the smaller one: largest at one row
        (336, 336, 12, (1, 1)),  # exactly one window
        (337, 336, 12, (2, 1)),
        (336, 560, 12, (1, 2)),
        (560, 560, 12, (2, 2)),
        (3000, 4000, 12, (3, 4)),
        (4000, 3000, 12, (4, 3)),
        (4000, 4000, 12, (3, 3)),  # 3x3, 3x4 and 4x3 shrink alike: the first in order
        (3000, 4000, 1, (1, 1)),
        (3000, 4000, 6, (2, 3)),
    ],
)
def test_tiling_worked_out_by_hand(
    height: int, width: int, max_crops: int, tiling: tuple[int, int]
) -> None:
    assert select_tiling(height, width, max_crops) == tiling


def test_positions_worked_out_by_hand() -> None:
    inputs = preprocess(noise(336, 560), IDS)  # 1 x 2
    # BOS, then the global view's start token, then rows of 12 features and a column token.
    whole = [[2 + 13 * row + column for column in range(12)] for row in range(12)]
    # The grid is 12 x 20; each crop keeps 10 columns: the left the first, the right the last ten.
    first = 1 + GLOBAL_TOKENS + 1
    left = [[first + 21 * r + c for c in range(10)] + [-100] * 2 for r in range(12)]
    right = [[-100] * 2 + [first + 21 * r + c for c in range(10, 20)] for r in range(12)]
    assert np.array_equal(inputs.image_input_idx, np.array([whole, left, right]).reshape(3, 144))
    assert inputs.image_tokens.tolist() == (
        [START, *([PATCH] * 12 + [COL]) * 12, END, START, *([PATCH] * 20 + [COL]) * 12, END]
    )

    inputs = preprocess(noise(560, 560), IDS)  # 2 x 2
    grid = np.array([[first + 21 * row + column for column in range(20)] for row in range(20)])
    expected = np.full((4, 12, 12), -100)
    expected[0, :10, :10] = grid[:10, :10]
    expected[1, :10, 2:] = grid[:10, 10:]
    expected[2, 2:, :10] = grid[10:, :10]
    expected[3, 2:, 2:] = grid[10:, 10:]
    assert np.array_equal(inputs.image_input_idx[1:], expected.reshape(4, 144))


def test_an_image_of_the_exact_canvas_size_is_cut_without_resizing() -> None:
    image = noise(336, 560)
    images = preprocess(image, IDS).images
    views = unnormalise(images)
    np.testing.assert_allclose(views[1], image[:, :336] / 255, atol=1e-6)
    np.testing.assert_allclose(views[2], image[:, 224:] / 255, atol=1e-6)
    # A patch is flattened as (row, column, channel).
    patch = image[14 * 3 : 14 * 4, 14 * 5 : 14 * 6].astype(np.float32) / 255
    flat = ((patch - MEAN) / STD).reshape(-1)
    np.testing.assert_allclose(images[1, 24 * 3 + 5], flat, atol=1e-5)


def test_padding_is_centred_black_and_normalised_and_masked() -> None:
    inputs = preprocess(np.full((400, 200, 3), 255, np.uint8), IDS, max_crops=1)
    # 400 x 200 into 336 x 336: 168 columns wide, 84 columns of padding on each side = 6 patches.
    views = unnormalise(inputs.images)
    np.testing.assert_allclose(views[:, :, 84:252], 1, atol=1e-5)
    np.testing.assert_allclose(views[:, :, :84], 0, atol=1e-6)
    np.testing.assert_allclose(views[:, :, 252:], 0, atol=1e-6)
    mask = inputs.image_masks[0].reshape(24, 24)
    assert np.array_equal(mask, np.repeat([[0.0] * 6 + [1.0] * 12 + [0.0] * 6], 24, axis=0))
    # 336 x 331 keeps its size: 2 columns of padding left, 3 right, of 14 each.
    mask = preprocess(noise(336, 331), IDS).image_masks[0].reshape(24, 24)
    np.testing.assert_allclose(mask[:, 0], 12 / 14, rtol=1e-6)
    np.testing.assert_allclose(mask[:, -1], 11 / 14, rtol=1e-6)
    assert np.all(mask[:, 1:-1] == 1)
    # Rows are those of the crops, and the last is -1.
    masks = preprocess(noise(336, 448), IDS).image_masks  # 1 x 2, padded at the far left and right
    left, right, last = masks.reshape(3, 24, 24)
    assert np.all(left[:, 0] == 0) and np.all(left[:, 12] == 1)
    assert np.all(right[:, -1] == 0) and np.all(right[:, 12] == 1)
    assert np.all(last == -1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (112, 112)])
def test_extreme_sizes_work_without_warning(height: int, width: int) -> None:
    inputs = preprocess(np.full((height, width, 3), 200, np.uint8), IDS)
    shown = unnormalise(inputs.images[:1]).max()
    assert shown == pytest.approx(200 / 255, abs=1e-5)
    assert inputs.image_masks.max() > 0


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_than_rgb_bytes_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ImageError, match="uint8 RGB"):
        preprocess(image, IDS)
