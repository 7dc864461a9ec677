"""What a picture looks like behind the door: orientation, transparency, depth and arrays."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from molmo_edge.errors import ImageError
from molmo_edge.images import ImageLimits, load, to_array
from molmo_edge.images_formats import orientation
from tests import fuzz_images
from tests.data.images import make
from tests.picture_files import ACCEPTED, WHITE, opened, pixels, png

# EXIF


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int) -> None:
    path = ACCEPTED / f"exif_{orientation}.jpg"
    decoded, lazy = opened(path), opened(path)
    decoded.load()
    expected = np.asarray(make.corners()).astype(int)
    for image in (path, decoded, lazy):
        picture = load(image)
        assert picture.size == (48, 32)
        assert np.abs(to_array(picture).astype(int) - expected).mean() < 6
        assert load(picture) == picture
    viewer = ImageOps.exif_transpose(opened(path))
    assert np.array_equal(to_array(load(path)), np.asarray(viewer))
    assert load(viewer) == load(path)


@pytest.mark.parametrize("name", ["exif_6.png", "exif_6.webp"])
def test_exif_orientation_is_applied_in_every_format_that_has_one(name: str) -> None:
    for image in (ACCEPTED / name, opened(ACCEPTED / name)):
        assert pixels(load(image)) == pixels(make.corners())


def test_png_orientation_after_the_pixels_counts() -> None:
    assert pixels(load(ACCEPTED / "exif_6_after_pixels.png")) == [WHITE, (0, 0, 0)]


@pytest.mark.parametrize("path", [*ACCEPTED.glob("exif_bad_*")], ids=lambda path: path.name)
def test_malformed_exif_counts_as_upright_without_a_warning(path: Path) -> None:
    upright = np.asarray(make.corners().resize((12, 8), Image.Resampling.NEAREST))
    assert np.abs(to_array(load(path)).astype(int) - upright).mean() < 30
    assert load(path).size == (12, 8)


@pytest.mark.parametrize("block", make.malformed_exif().values(), ids=make.malformed_exif())
def test_malformed_exif_blocks_name_orientation_one(block: bytes) -> None:
    assert orientation(block) == 1


def test_the_first_of_two_exif_blocks_counts() -> None:
    data = make.encode(make.stored(6), "JPEG", exif=make.exif(6))
    second = b"\xff\xe1" + (len(make.exif(3)) + 2).to_bytes(2, "big") + make.exif(3)
    start = data.index(b"\xff\xdb")
    assert load(data[:start] + second + data[start:]) == load(data)


# Transparency and depth


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("palette.png", [(255, 0, 0), (0, 255, 0), (0, 0, 255)]),
        ("palette_key.png", [(255, 0, 0), WHITE, (0, 0, 255)]),
        ("palette_alpha.png", [WHITE, (127, 255, 127), (0, 0, 255)]),
        ("bilevel.png", [(0, 0, 0)] * 4 + [WHITE] * 4),
        ("bilevel_key.png", [WHITE] * 8),
        ("grey2_key.png", [(0,) * 3, WHITE, (170,) * 3, WHITE]),
        ("grey4_key.png", [(0,) * 3, (17,) * 3, WHITE, WHITE]),
        ("grey8_key.png", [(0,) * 3, WHITE, (128,) * 3]),
        ("rgb_key.png", [WHITE, (4, 5, 6)]),
        ("rgb16_key.png", [WHITE, (0x11, 0x22, 0x33)]),
        ("rgba16.png", [(0x80, 0, 0xFF)]),
        ("grey16.png", [(0,) * 3, (0,) * 3, (1,) * 3, (128,) * 3, WHITE]),
        ("grey16_key.png", [(0,) * 3, WHITE, (1,) * 3, (128,) * 3, WHITE]),
        ("grey16_alpha.png", [(0x40,) * 3, WHITE]),
        ("alpha.webp", [(10, 20, 30), WHITE]),
        ("alpha.bmp", [(10, 20, 30), WHITE]),
        ("alpha_all_zero.bmp", [(10, 20, 30), (40, 50, 60)]),
        ("text_transparency.png", [(1, 2, 3), (4, 5, 6)]),
    ],
)
def test_transparency_is_white_and_depth_is_scaled(name: str, expected: list[Any]) -> None:
    assert pixels(load(ACCEPTED / name)) == expected


def test_alpha_is_composited_on_white_to_the_nearest_level() -> None:
    alpha, colour = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([colour, 255 - colour, colour * 0, alpha], axis=-1).astype(np.uint8)
    wide = rgba.astype(float)
    share = wide[..., 3:] / 255
    exact = wide[..., :3] * share + 255 * (1 - share)
    assert np.abs(to_array(load(Image.fromarray(rgba))) - exact).max() <= 0.5


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_fully_transparent_is_white_and_opaque_is_the_colour_in_every_mode(mode: str) -> None:
    picture = Image.new(mode, (2, 1))
    if mode == "PA":
        picture.putpalette([10, 10, 10])
    bands = len(picture.getbands())
    value = 0 if mode == "PA" else 10
    picture.putpixel((0, 0), (*[value] * (bands - 1), 255))
    picture.putpixel((1, 0), (*[0] * (bands - 1), 0))
    assert pixels(load(picture)) == [(10, 10, 10), WHITE]


def test_palettes_with_alpha_are_composited() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 255, 40, 50, 60, 0], "RGBA")
    picture.putpixel((1, 0), 1)
    assert pixels(load(picture)) == [(10, 20, 30), WHITE]


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L", "I;16N"])
def test_sixteen_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    values = [0, 128, 129, 256, 257, 32767, 65406, 65407, 65535]
    picture = Image.new(mode, (len(values), 1))
    for column, value in enumerate(values):
        picture.putpixel((column, 0), value)
    grey = [pixel[0] for pixel in pixels(load(picture))]
    assert grey == [round(value / 257) for value in values]
    picture.info["transparency"] = 257
    assert [pixel[0] for pixel in pixels(load(picture))][4] == 255


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_integers_outside_sixteen_bits_are_refused(value: int) -> None:
    with pytest.raises(ImageError, match=r"0\.\.65535"):
        load(Image.new("I", (2, 2), value))


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_modes_without_an_agreed_form_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=f"mode {mode} "):
        load(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "P"])
def test_modes_without_alpha_are_converted_by_pil(mode: str) -> None:
    picture = fuzz_images.picture_of_mode(mode, (16, 16))
    assert np.array_equal(to_array(load(picture)), np.asarray(picture.convert("RGB")))


def test_no_mode_of_this_pillow_is_forgotten() -> None:
    for mode in Image.MODES:
        refused = mode in fuzz_images.REFUSED_MODES
        picture = fuzz_images.picture_of_mode(mode, (2, 2), b"\0")
        if refused:
            with pytest.raises(ImageError):
                load(picture)
        else:
            assert load(picture).size == (2, 2)


# Arrays


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5, 3), np.int8),
        np.zeros((4, 5, 3), np.uint16),
        np.zeros((4, 5, 3), bool),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((4, 5, 1), np.uint8),
        np.zeros((4, 5), np.uint8),
        np.zeros((1, 4, 5, 3), np.uint8),
        np.zeros((), np.uint8),
        np.zeros((4, 5, 3), [("r", "u1")]),
        np.array([[None]]),
    ],
    ids=lambda array: f"{array.dtype.name}-{array.shape}",
)
def test_arrays_of_another_kind_are_refused_by_dtype_and_shape(array: Any) -> None:
    with pytest.raises(ImageError) as caught:
        load(array)
    assert array.dtype.name in str(caught.value) and str(array.shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3)])
def test_empty_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="empty"):
        load(np.zeros(shape, np.uint8))


def test_masked_arrays_are_refused() -> None:
    with pytest.raises(ImageError, match="masked"):
        load(np.zeros((4, 5, 3), np.uint8).view(np.ma.MaskedArray))


def test_huge_views_are_refused_before_they_are_copied() -> None:
    with pytest.raises(ImageError, match="max_pixels"):
        load(np.broadcast_to(np.uint8(0), (100_000, 100_000, 3)))


def test_views_and_read_only_arrays_load_and_nothing_is_shared() -> None:
    array = np.random.default_rng(1).integers(0, 256, (8, 6, 3), np.uint8)
    for view in (array, array[::-1, ::2], array[..., ::-1], np.asfortranarray(array)):
        assert np.array_equal(to_array(load(view)), view)
    frozen = array.copy()
    frozen.flags.writeable = False
    picture = load(frozen)
    before = to_array(picture)
    frozen.flags.writeable = True
    frozen[:] = 0
    assert np.array_equal(to_array(picture), before) and before.any()
    picture.putpixel((0, 0), (1, 2, 3))
    assert not frozen.any()


def test_to_array_gives_a_writable_contiguous_copy() -> None:
    picture = load(make.corners())
    array = to_array(picture)
    assert array.shape == (32, 48, 3) and array.dtype == np.uint8
    assert array.flags.c_contiguous and array.flags.writeable and array.flags.owndata
    array[:] = 7
    assert picture == load(make.corners())


@pytest.mark.parametrize("image", [Image.new("L", (2, 2)), None, np.zeros((2, 2, 3), np.uint8)])
def test_to_array_takes_rgb_pictures_only(image: Any) -> None:
    with pytest.raises(ImageError, match=r"load\(\)"):
        to_array(image)


@pytest.mark.parametrize("image", [None, 3, ["a.png"], io.BytesIO(png()), {"bytes": b""}, object()])
def test_other_types_are_named_and_refused(image: Any) -> None:
    with pytest.raises(ImageError, match=type(image).__name__):
        load(image)


def test_views_of_bytes_load_whatever_their_layout() -> None:
    data = png()
    doubled = bytes(value for byte in data for value in (byte, 0))
    assert load(memoryview(doubled)[::2]) == load(data)
    with pytest.raises(ImageError, match="max_bytes"):
        load(memoryview(data), ImageLimits(max_bytes=len(data) - 1))
    released = memoryview(data)
    released.release()
    with pytest.raises(ImageError) as caught:
        load(released)
    assert isinstance(caught.value.__cause__, ValueError)
