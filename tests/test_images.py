"""The one door for pictures: what it accepts, what it refuses and what it leaves alone."""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from molmo_edge.errors import ConfigError, ImageError
from molmo_edge.images import FOREIGN_ERRORS, ImageLimits, load, to_array
from molmo_edge.images_formats import MAX_JPEG_SCANS
from tests import fuzz_images
from tests.data.images import make

DATA = Path(__file__).parent / "data" / "images"
ACCEPTED, REFUSED = DATA / "accepted", DATA / "refused"
WHITE = (255, 255, 255)


def files(folder: Path) -> list[Any]:
    return [pytest.param(path, id=path.name) for path in sorted(folder.iterdir())]


def pixels(picture: Image.Image) -> list[Any]:
    return [tuple(pixel) for row in to_array(picture).tolist() for pixel in row]


def png(**options: Any) -> bytes:
    return make.encode(make.corners(), "PNG", **options)


def opened(path: Path) -> ImageFile.ImageFile:
    """The file opened by PIL, not decoded; what PIL warns about it is not our matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(path.read_bytes()))


# Files


@pytest.mark.parametrize("path", files(ACCEPTED))
def test_accepted_files_load_from_path_str_and_bytes_alike(path: Path) -> None:
    data = path.read_bytes()
    picture = load(path)
    assert type(picture) is Image.Image and picture.mode == "RGB" and picture.info == {}
    for same in (str(path), data, bytearray(data), memoryview(data)):
        assert load(same) == picture


@pytest.mark.parametrize("path", files(REFUSED))
def test_refused_files_are_image_errors(path: Path) -> None:
    for image in (path, path.read_bytes()):
        with pytest.raises(ImageError) as caught:
            load(image)
        assert path.name not in str(caught.value)


@pytest.mark.parametrize("path", files(DATA / "fuzz"))
def test_files_found_by_fuzzing_stay_harmless(path: Path) -> None:
    fuzz_images.load_or_refuse(path.read_bytes())


def test_crafted_files_are_few_and_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 300_000


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp"])
def test_a_picture_over_the_pixel_cap_is_refused_from_its_header(extension: str) -> None:
    data = (REFUSED / f"huge.{extension}").read_bytes()
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"pixels|MAX_IMAGE_PIXELS"):
        load(data)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})]
)
def test_lossless_formats_keep_every_pixel(file_format: str, options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (31, 17, 3), np.uint8)
    data = make.encode(Image.fromarray(noise), file_format, **options)
    assert np.array_equal(to_array(load(data)), noise)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_decodes_as_pil_decodes_it(options: dict[str, Any]) -> None:
    data = make.encode(make.corners(), "JPEG", comment=b"hello", exif=make.exif(1), **options)
    assert np.array_equal(to_array(load(data)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("name", ["cmyk.jpg", "ycck.jpg", "grey.jpg", "rle4.bmp", "rgb555.bmp"])
def test_other_colour_spaces_are_converted_by_pil(name: str) -> None:
    expected = opened(ACCEPTED / name).convert("RGB")
    assert np.array_equal(to_array(load(ACCEPTED / name)), np.asarray(expected))


@pytest.mark.parametrize("name", ["animated.png", "animated.webp"])
def test_animations_are_their_first_frame(name: str) -> None:
    assert set(pixels(load(ACCEPTED / name))) == {(255, 0, 0)}


def test_phone_mpo_is_its_first_picture() -> None:
    first = opened(ACCEPTED / "phone.mpo")
    assert first.format == "MPO" and first.n_frames == 2
    assert np.array_equal(to_array(load(ACCEPTED / "phone.mpo")), np.asarray(first))


def test_scans_up_to_the_limit_load_and_one_more_does_not() -> None:
    own = make.scan_bomb(0).count(b"\xff\xda")
    assert load(make.scan_bomb(MAX_JPEG_SCANS - own)).size == (16, 16)
    with pytest.raises(ImageError, match="scans"):
        load(make.scan_bomb(MAX_JPEG_SCANS - own + 1))


def test_metadata_bombs_take_no_time() -> None:
    plain = make.encode(make.corners(), "JPEG")
    exif = b"\xff\xe1\0\x0cExif\0\0abcd"
    tables = b"\xff\xdb\0\x02"
    texts = make.chunk(b"tEXt", b"a\0b") * 20_000
    picture = png()
    started = time.process_time()
    assert load(plain[:2] + exif * 5_000 + plain[2:]).size == (48, 32)
    for segment in (exif, tables):
        with pytest.raises(ImageError, match="segments"):
            load(plain[:2] + segment * 200_000 + plain[2:])
    assert load(picture[:33] + texts + picture[33:]).size == (48, 32)
    assert time.process_time() - started < 2


# Paths


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/cat.png",
        "HTTPS://example.com/cat.png",
        " https://example.com/cat.png",
        "file:///etc/hostname",
        "data:image/png;base64,AAAA",
        "s3://bucket/cat.png",
        "gopher+x.y-z://host/1",
        "",
    ],
)
def test_a_str_is_never_a_url(url: str) -> None:
    with pytest.raises(ImageError, match="fetches nothing"):
        load(url)


@pytest.mark.parametrize("image", ["no/such/picture.png", Path("no/such.png"), "a\0b", "x" * 5000])
def test_paths_that_cannot_be_read_chain_their_cause(image: str | Path) -> None:
    with pytest.raises(ImageError, match="could not read the picture file") as caught:
        load(image)
    assert isinstance(caught.value.__cause__, OSError | ValueError)
    assert str(image) not in str(caught.value)


@pytest.mark.timeout(10)
def test_pipes_devices_and_directories_are_refused_without_blocking(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    link = tmp_path / "link.png"
    link.symlink_to(pipe)
    for path in (pipe, link, tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ImageError, match="regular file"):
            load(path)


@pytest.mark.timeout(10)
def test_a_pipe_that_replaces_the_file_after_the_look_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, file = tmp_path / "pipe.png", tmp_path / "file.png"
    os.mkfifo(pipe)
    file.write_bytes(png())
    seen = file.stat()
    monkeypatch.setattr(Path, "stat", lambda self, **_: seen)
    with pytest.raises(ImageError, match="regular file"):
        load(pipe)


def test_symbolic_links_to_files_load(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(ACCEPTED / "palette.png")
    assert load(link).size == (3, 1)


def test_the_byte_cap_is_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(ImageLimits().max_bytes + 1)
    tracemalloc.start()
    with pytest.raises(ImageError, match="bytes, the limit"):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("limits", [ImageLimits(), ImageLimits(max_bytes=2**62)])
def test_no_more_is_read_than_the_file_said_it_holds(limits: ImageLimits, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="empty"):
        load("/proc/self/status", limits)  # says 0 bytes and would then deliver some
    path = tmp_path / "corners.png"
    path.write_bytes(png())
    with Image.open(path) as lazy:
        assert load(path, limits) == load(lazy, limits)


# Limits


def test_limits_are_inclusive() -> None:
    data = png()
    load(data, ImageLimits(max_bytes=len(data), max_pixels=48 * 32))
    with pytest.raises(ImageError, match="max_bytes"):
        load(data, ImageLimits(max_bytes=len(data) - 1))
    for image in (data, make.corners(), np.asarray(make.corners()), Image.open(io.BytesIO(data))):
        with pytest.raises(ImageError, match="max_pixels"):
            load(image, ImageLimits(max_pixels=48 * 32 - 1))


@pytest.mark.parametrize("value", [0, -1, True, 1.5, float("inf"), None, "9"])
@pytest.mark.parametrize("name", ["max_bytes", "max_pixels"])
def test_limits_are_positive_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ImageLimits(**{name: value})


def test_pils_own_bomb_check_never_surfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    # Between once and twice this bound PIL warns, above it raises.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    picture = make.corners()
    for file_format in ("JPEG", "PNG", "BMP", "WEBP"):
        assert load(make.encode(picture, file_format)).size == (48, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for file_format in ("JPEG", "PNG", "BMP"):
        assert load(make.encode(picture, file_format)).size == (48, 32)
    with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS") as caught:
        load(make.encode(picture, "WEBP"))
    assert isinstance(caught.value.__cause__, Image.DecompressionBombError)


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
        load(np.ma.masked_all((4, 5, 3), np.uint8))


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


# PIL images


class Labelled(Image.Image):
    """A caller's own subclass."""

    label = "mine"


def test_pil_images_are_left_as_they_are() -> None:
    picture = fuzz_images.picture_of_mode("P", (9, 9))
    picture.info.update(transparency=bytes(range(200)), exif=make.exif(6), note=["x"])
    before = picture.tobytes(), dict(picture.info), picture.getpalette("RGBA"), picture.mode
    load(picture)
    after = picture.tobytes(), dict(picture.info), picture.getpalette("RGBA"), picture.mode
    assert after == before


def test_the_answer_is_a_new_picture() -> None:
    picture = make.corners()
    answer = load(picture)
    answer.paste((0, 0, 0), (0, 0, 48, 32))
    assert picture == make.corners()


def test_subclasses_load() -> None:
    picture = Labelled()
    source = make.corners()
    picture.__setstate__(source.__getstate__())
    assert type(load(picture)) is Image.Image
    assert pixels(load(picture)) == pixels(source)


@pytest.mark.parametrize("path", files(ACCEPTED))
def test_lazy_images_are_neither_decoded_nor_moved(path: Path) -> None:
    try:
        lazy = opened(path)
    except (SyntaxError, ValueError, OSError):
        assert path.name.startswith("text_")  # PIL gives up over the text we skip
        return
    state = lazy.fp, lazy.fp.tell(), list(lazy.tile), dict(lazy.info), lazy._im
    assert load(lazy) == load(path)
    assert (lazy.fp, lazy.fp.tell(), lazy.tile, lazy.info, lazy._im) == state


def test_lazy_images_with_a_file_of_their_own_keep_it() -> None:
    with Image.open(ACCEPTED / "exif_6.png") as lazy:
        position = lazy.fp.tell()
        assert load(lazy).size == (48, 32)
        assert lazy.fp.tell() == position and lazy.size == (32, 48)
        lazy.load()


@pytest.mark.parametrize("name", ["animated.png", "animated.webp", "phone.mpo"])
def test_a_later_frame_is_the_one_the_caller_chose(name: str) -> None:
    lazy = opened(ACCEPTED / name)
    lazy.seek(1)
    assert pixels(load(lazy)) != pixels(load(ACCEPTED / name))
    assert pixels(load(lazy)) == pixels(lazy.convert("RGB"))


def test_a_drafted_picture_keeps_the_size_the_caller_asked_for() -> None:
    lazy = Image.open(io.BytesIO(make.encode(make.corners(), "JPEG")))
    lazy.draft("RGB", (24, 16))
    assert load(lazy).size == lazy.size == (24, 16)


def test_closed_images_are_refused() -> None:
    lazy, decoded = (opened(ACCEPTED / "palette.png") for _ in range(2))
    made = make.corners()
    decoded.load()
    for image in (lazy, decoded, made):
        image.close()
    for image in (lazy, decoded, made):
        with pytest.raises(ImageError, match="closed"):
            load(image)


def test_images_whose_file_was_closed_under_them_are_refused() -> None:
    file = io.BytesIO(png())
    lazy = Image.open(file)
    file.close()
    with pytest.raises(ImageError, match="closed") as caught:
        load(lazy)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("name", ["page.eps", "picture.gif", "picture.tif"])
def test_lazy_images_of_other_formats_are_not_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = opened(REFUSED / name)

    def decode(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(type(lazy), "load", decode)
    with pytest.raises(ImageError, match=str(lazy.format)) as caught:
        load(lazy)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["picture.gif", "picture.tif"])
def test_decoded_images_of_other_formats_load(name: str) -> None:
    picture = opened(REFUSED / name)
    picture.load()
    assert pixels(load(picture)) == pixels(picture.convert("RGB"))


def test_uninitialised_images_are_refused() -> None:
    with pytest.raises(ImageError, match="empty"):
        load(Image.Image())


# Errors


@pytest.mark.parametrize("kind", FOREIGN_ERRORS, ids=lambda kind: kind.__name__)
def test_foreign_errors_are_mapped_with_their_cause(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = kind("<secret at 0x7f00>")

    def fail(self: Any) -> None:
        raise raised

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError) as caught:
        load(png())
    assert caught.value.__cause__ is raised
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interrupts_pass_through(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise kind

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(kind):
        load(png())


PIL_MODULES = [
    "Image", "ImageFile", "ImageMode", "ImagePalette", "_binary", "_util", "BmpImagePlugin",
    "JpegImagePlugin", "PngImagePlugin", "WebPImagePlugin", "MpoImagePlugin",
]  # fmt: skip


@pytest.mark.parametrize("name", PIL_MODULES)
def test_every_error_that_pil_raises_is_mapped(name: str) -> None:
    module = importlib.import_module(f"PIL.{name}")
    assert module.__file__
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        called = node.exc.func
        if not isinstance(called, ast.Name):
            continue
        kind = getattr(module, called.id, getattr(builtins, called.id, None))
        if isinstance(kind, type):
            assert issubclass(kind, FOREIGN_ERRORS), called.id


def test_every_error_class_of_pil_is_mapped() -> None:
    for name in PIL_MODULES:
        for value in vars(importlib.import_module(f"PIL.{name}")).values():
            if isinstance(value, type) and issubclass(value, Exception):
                assert issubclass(value, FOREIGN_ERRORS), value


# The process around


def test_a_damaged_file_does_not_disturb_its_neighbours() -> None:
    good = {path: pixels(load(path)) for path in list(ACCEPTED.iterdir())[:12]}
    bad = list(REFUSED.iterdir())[:12]
    wrong: list[str] = []

    def work() -> None:
        for (path, expected), damaged in zip(good.items(), bad, strict=True):
            try:
                load(damaged)
                wrong.append(damaged.name)
            except ImageError:
                pass
            if pixels(load(path)) != expected:
                wrong.append(path.name)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_pils_global_settings_are_untouched() -> None:
    load(png())
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3


def test_importing_the_door_loads_no_model_code() -> None:
    code = "import sys, molmo_edge.images; print(sorted({'torch','vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PROPERTIES: list[Callable[[], None]] = [
    value for name, value in vars(fuzz_images).items() if name.startswith("test_")
]


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__[5:])
def test_property(holds: Callable[[], None]) -> None:
    holds()


def test_fuzzing_starts_from_every_mode_and_format() -> None:
    made = {tuple(name.split("-")[:2]) for name in fuzz_images.SEEDS if "-" in name}
    assert {"JPEG", "PNG", "WEBP", "BMP"} == {file_format for _, file_format in made}
    assert len(made) >= 20
