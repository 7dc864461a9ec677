"""Loading images: files, paths, limits, errors, orientation, modes, PIL images and arrays."""

from __future__ import annotations

import io
import os
import struct
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
from molmo_edge.images import FOREIGN_ERRORS, MAX_JPEG_SCANS, ImageLimits, load, to_array
from tests import fuzz_images
from tests.image_files import (
    ACCEPTED,
    FUZZ,
    REFUSED,
    WHITE,
    chunk,
    corners,
    encode,
    exif,
    image_of_mode,
    opened,
    pixels,
    scan_bomb,
    stored,
)

PNG = encode(corners(), "PNG")
# Pillow warns about malformed metadata.
quiet = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
accepted = pytest.mark.parametrize("name", ACCEPTED)
refused = pytest.mark.parametrize("name", REFUSED)

# Files


@quiet
@accepted
def test_files_load_from_path_str_and_bytes_alike(name: str, tmp_path: Path) -> None:
    data = ACCEPTED[name]
    path = tmp_path / name
    path.write_bytes(data)
    image = load(path)
    assert type(image) is Image.Image and image.mode == "RGB" and image.info == {}
    for same in (str(path), data, bytearray(data), memoryview(data)):
        assert load(same) == image


@quiet
@refused
def test_refused_files_are_image_errors(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(REFUSED[name])
    for image in (path, REFUSED[name]):
        with pytest.raises(ImageError) as caught:
            load(image)
        assert name not in str(caught.value)


@pytest.mark.parametrize("path", sorted(FUZZ.iterdir()), ids=lambda path: path.name)
def test_files_found_by_fuzzing_stay_harmless(path: Path) -> None:
    fuzz_images.load_or_refuse(path.read_bytes())


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp"])
def test_an_image_over_the_pixel_cap_is_refused_from_its_header(kind: str) -> None:
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"pixels|DecompressionBomb"):
        load(REFUSED[f"huge.{kind}"])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})]
)
def test_lossless_formats_keep_every_pixel(file_format: str, options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (31, 17, 3), np.uint8)
    data = encode(Image.fromarray(noise), file_format, **options)
    assert np.array_equal(to_array(load(data)), noise)


@pytest.mark.parametrize(
    "data",
    [
        *[ACCEPTED[name] for name in ("cmyk.jpg", "ycck.jpg", "grey.jpg", "rle4.bmp")],
        *[ACCEPTED[name] for name in ("progressive.jpg", "phone.mpo", "rgb555.bmp")],
        encode(corners(), "JPEG", comment=b"hello", subsampling=0),
    ],
)
def test_files_decode_as_pillow_decodes_them(data: bytes) -> None:
    assert np.array_equal(to_array(load(data)), np.asarray(opened(data).convert("RGB")))


@pytest.mark.parametrize("name", ["animated.png", "animated.webp"])
def test_animations_are_their_first_frame(name: str) -> None:
    assert set(pixels(load(ACCEPTED[name]))) == {(255, 0, 0)}


def test_scans_up_to_the_limit_load_and_one_more_does_not() -> None:
    own = scan_bomb(0).count(b"\xff\xda")
    assert load(scan_bomb(MAX_JPEG_SCANS - own)).size == (16, 16)
    with pytest.raises(ImageError, match="scans"):
        load(scan_bomb(MAX_JPEG_SCANS - own + 1))


@quiet
def test_metadata_bombs_take_no_time() -> None:
    plain = encode(corners(), "JPEG")
    block = b"\xff\xe1\0\x0cExif\0\0abcd"
    texts = chunk(b"tEXt", b"a\0b") * 20_000
    started = time.process_time()
    assert load(plain[:2] + block * 50 + plain[2:]).size == (48, 32)
    for segment in (block, b"\xff\xdb\0\x02"):
        with pytest.raises(ImageError, match=r"EXIF blocks|segments"):
            load(plain[:2] + segment * 200_000 + plain[2:])
    assert load(PNG[:33] + texts + PNG[33:]).size == (48, 32)
    assert time.process_time() - started < 2


# Paths


URLS = "http://host/a.png|HTTPS://host/a|  https://host/a|file:///etc/a|data:image/png;base64,AAAA"


@pytest.mark.parametrize("url", [*URLS.split("|"), "s3://bucket/a.png", "gopher+x.y://host/1", ""])
def test_a_str_is_never_a_url(url: str) -> None:
    with pytest.raises(ImageError, match="fetches nothing"):
        load(url)


@pytest.mark.parametrize("image", ["no/such/image.png", Path("no/such.png"), "a\0b", "x" * 5000])
def test_paths_that_cannot_be_read_chain_their_cause(image: str | Path) -> None:
    with pytest.raises(ImageError, match="could not read the image file") as caught:
        load(image)
    assert isinstance(caught.value.__cause__, OSError | ValueError)
    assert str(image) not in str(caught.value)


@pytest.mark.timeout(10)
def test_pipes_devices_and_directories_are_refused_without_blocking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, link, file = tmp_path / "pipe.png", tmp_path / "link.png", tmp_path / "file.png"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link, tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ImageError, match="regular file"):
            load(path)
    # A pipe that replaces the file after it was looked at.
    file.write_bytes(PNG)
    seen = file.stat()
    monkeypatch.setattr(Path, "stat", lambda self, **_: seen)
    with pytest.raises(ImageError, match="regular file"):
        load(pipe)


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
    path, link = tmp_path / "corners.png", tmp_path / "link"
    path.write_bytes(PNG)
    link.symlink_to(path)
    with Image.open(path) as lazy:
        assert load(path, limits) == load(lazy, limits) == load(link, limits)


# Limits


def test_limits_are_inclusive() -> None:
    load(PNG, ImageLimits(max_bytes=len(PNG), max_pixels=48 * 32))
    with pytest.raises(ImageError, match="max_bytes"):
        load(PNG, ImageLimits(max_bytes=len(PNG) - 1))
    for image in (PNG, corners(), np.asarray(corners()), opened(PNG)):
        with pytest.raises(ImageError, match="max_pixels"):
            load(image, ImageLimits(max_pixels=48 * 32 - 1))


@pytest.mark.parametrize("value", [0, -1, True, 1.5, float("inf"), None, "9"])
@pytest.mark.parametrize("name", ["max_bytes", "max_pixels"])
def test_limits_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ImageLimits(**{name: value})


def test_pillows_own_bomb_check_never_surfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    # Between once and twice this bound Pillow warns, above it raises.
    for bound in (1000, 10):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
        for file_format in ("JPEG", "PNG", "BMP"):
            assert load(encode(corners(), file_format)).size == (48, 32)
    try:
        assert load(encode(corners(), "WEBP")).size == (48, 32)
    except ImageError as error:  # newer Pillow checks WebP inside its decoder
        assert isinstance(error.__cause__, Image.DecompressionBombError)


# The process around


def test_a_damaged_file_does_not_disturb_its_neighbours() -> None:
    good = [(data, pixels(load(data))) for data in list(ACCEPTED.values())[:12]]
    wrong: list[bytes] = []

    def work() -> None:
        for (data, expected), damaged in zip(good, list(REFUSED.values())[:12], strict=True):
            try:
                load(damaged)
                wrong.append(damaged)
            except ImageError:
                pass
            if pixels(load(data)) != expected:
                wrong.append(data)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_global_settings_are_untouched() -> None:
    before = list(warnings.filters)
    load(PNG)
    assert warnings.filters == before
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3


PROPERTIES: list[Callable[[], None]] = [
    value for name, value in vars(fuzz_images).items() if name.startswith("test_")
]


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__[5:])
def test_fuzz(holds: Callable[[], None]) -> None:
    holds()


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
        load(PNG)
    assert caught.value.__cause__ is raised
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, AssertionError, AttributeError])
def test_interrupts_and_errors_of_our_own_pass_through(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise kind

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(kind):
        load(PNG)


def test_a_warning_that_the_application_made_an_error_is_an_image_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError):
            load(ACCEPTED["animation_twice.png"])


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int) -> None:
    data = ACCEPTED[f"exif_{orientation}.jpg"]
    decoded = opened(data)
    decoded.load()
    expected = np.asarray(corners()).astype(int)
    for image in (data, decoded, opened(data)):
        loaded = load(image)
        assert loaded.size == (48, 32)
        assert np.abs(to_array(loaded).astype(int) - expected).mean() < 6
        assert load(loaded) == loaded
    viewer = ImageOps.exif_transpose(opened(data))
    assert np.array_equal(to_array(load(data)), np.asarray(viewer))
    assert load(viewer) == load(data)


def test_exif_orientation_is_applied_in_every_format_that_has_one() -> None:
    for name in ("exif_6.png", "exif_6.webp"):
        for image in (ACCEPTED[name], opened(ACCEPTED[name])):
            assert pixels(load(image)) == pixels(corners())
    upright = load(ACCEPTED["exif_6_after_pixels.png"])
    assert upright.size == (1, 2) and pixels(upright) == [(0, 0, 0), WHITE]


def test_other_exif_data_that_pillow_cannot_write_again_does_no_harm() -> None:
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    odd = struct.pack("<HHI", 0x9000, 12, 1) + b"\xff" * 4  # a number beyond the block's end
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entry + odd + bytes(4)
    image = stored(6)
    image.info["exif"] = block
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pixels(load(image)) == pixels(corners())


@quiet
@pytest.mark.parametrize("name", [name for name in ACCEPTED if name.startswith("exif_bad")])
def test_malformed_exif_counts_as_upright(name: str) -> None:
    upright = np.asarray(corners().resize((12, 8), Image.Resampling.NEAREST))
    assert load(ACCEPTED[name]).size == (12, 8)
    assert np.abs(to_array(load(ACCEPTED[name])).astype(int) - upright).mean() < 30


# Transparency and depth


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("palette.png", [(255, 0, 0), (0, 255, 0), (0, 0, 255)]),
        ("palette_key.png", [(255, 0, 0), WHITE, (0, 0, 255)]),
        ("palette_alpha.png", [WHITE, (127, 255, 127), (0, 0, 255)]),
        ("bilevel.png", [(0, 0, 0)] * 4 + [WHITE] * 4),
        ("bilevel_key.png", [WHITE] * 8),
        ("grey8_key.png", [(0,) * 3, WHITE, (128,) * 3]),
        ("rgb_key.png", [WHITE, (4, 5, 6)]),
        ("rgba16.png", [(0x80, 0, 0xFF)]),
        ("grey16.png", [(0,) * 3, (0,) * 3, (1,) * 3, (128,) * 3, WHITE]),
        ("grey16_key.png", [(0,) * 3, WHITE, (1,) * 3, (128,) * 3, WHITE]),
        ("grey16_alpha.png", [(0x40,) * 3, WHITE]),
        ("alpha.webp", [(10, 20, 30), WHITE]),
        ("alpha.bmp", [(10, 20, 30), WHITE]),
        ("alpha_all_zero.bmp", [(10, 20, 30), (40, 50, 60)]),
    ],
)
def test_transparency_is_white_and_depth_is_scaled(name: str, expected: list[Any]) -> None:
    assert pixels(load(ACCEPTED[name])) == expected


def test_alpha_is_composited_on_white_to_the_nearest_level() -> None:
    alpha, colour = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([colour, 255 - colour, colour * 0, alpha], axis=-1).astype(np.uint8)
    wide = rgba.astype(float)
    share = wide[..., 3:] / 255
    exact = wide[..., :3] * share + 255 * (1 - share)
    assert np.abs(to_array(load(Image.fromarray(rgba))) - exact).max() <= 0.5


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_fully_transparent_is_white_and_opaque_is_the_colour_in_every_mode(mode: str) -> None:
    image = Image.new(mode, (2, 1))
    if mode == "PA":
        image.putpalette([10, 10, 10])
    bands = len(image.getbands())
    value = 0 if mode == "PA" else 10
    image.putpixel((0, 0), (*[value] * (bands - 1), 255))
    image.putpixel((1, 0), (*[0] * (bands - 1), 0))
    assert pixels(load(image)) == [(10, 10, 10), WHITE]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 255, 40, 50, 60, 0], "RGBA")
    palette.putpixel((1, 0), 1)
    assert pixels(load(palette)) == [(10, 20, 30), WHITE]


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L", "I;16N"])
def test_sixteen_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    values = [0, 128, 129, 256, 257, 32767, 65406, 65407, 65535]
    image = Image.new(mode, (len(values), 1))
    for column, value in enumerate(values):
        image.putpixel((column, 0), value)
    assert [pixel[0] for pixel in pixels(load(image))] == [round(value / 257) for value in values]
    image.info["transparency"] = 257
    assert pixels(load(image))[4] == WHITE


def test_every_mode_of_this_pillow_loads_or_is_refused_by_name() -> None:
    for mode in Image.MODES:
        if mode in fuzz_images.REFUSED_MODES:
            with pytest.raises(ImageError, match=f"mode {mode} "):
                load(Image.new(mode, (2, 2)))
            continue
        image = image_of_mode(mode, (2, 2), b"\0")
        assert load(image).size == (2, 2)
        if not image.has_transparency_data:
            assert np.array_equal(to_array(load(image)), np.asarray(image.convert("RGB")))
    for value in (-1, 65536, 2**31 - 1):
        with pytest.raises(ImageError, match=r"0\.\.65535"):
            load(Image.new("I", (2, 2), value))


# PIL images


def test_pil_images_are_left_as_they_are_and_nothing_is_shared() -> None:
    image = image_of_mode("P", (9, 9))
    image.info.update(transparency=bytes(range(200)), exif=exif(6), note=["x"])
    before = image.tobytes(), dict(image.info), image.getpalette("RGBA"), image.mode
    load(image).paste((0, 0, 0), (0, 0, 9, 9))
    assert (image.tobytes(), dict(image.info), image.getpalette("RGBA"), image.mode) == before
    source = type("Labelled", (Image.Image,), {})()
    source.__setstate__(corners().__getstate__())
    loaded = load(source)
    loaded.paste((0, 0, 0), (0, 0, 24, 16))
    assert type(loaded) is Image.Image and pixels(source) == pixels(corners())


@quiet
@accepted
def test_lazy_images_are_neither_decoded_nor_moved(name: str) -> None:
    lazy = opened(ACCEPTED[name])
    state = lazy.fp, lazy.fp.tell(), list(lazy.tile), dict(lazy.info), lazy._im
    assert load(lazy) == load(ACCEPTED[name])
    assert (lazy.fp, lazy.fp.tell(), lazy.tile, lazy.info, lazy._im) == state
    lazy.load()


@pytest.mark.parametrize("name", ["animated.png", "animated.webp", "phone.mpo"])
def test_a_later_frame_is_the_one_the_caller_chose(name: str) -> None:
    lazy = opened(ACCEPTED[name])
    lazy.seek(1)
    assert pixels(load(lazy)) != pixels(load(ACCEPTED[name]))
    assert pixels(load(lazy)) == pixels(lazy.convert("RGB"))


def test_a_drafted_image_keeps_the_size_the_caller_chose() -> None:
    lazy = opened(encode(corners(), "JPEG"))
    lazy.draft("RGB", (24, 16))
    assert load(lazy).size == lazy.size == (24, 16)


def test_closed_and_uninitialised_images_are_refused() -> None:
    lazy, decoded, made = opened(PNG), opened(PNG), corners()
    decoded.load()
    for image in (lazy, decoded, made):
        image.close()
    file = io.BytesIO(PNG)
    without_file = Image.open(file)
    file.close()
    for image in (lazy, decoded, made, without_file):
        with pytest.raises(ImageError, match="closed"):
            load(image)
    with pytest.raises(ImageError, match="empty"):
        load(Image.Image())


@pytest.mark.parametrize("name", ["page.eps", "image.gif", "image.tiff"])
def test_lazy_images_of_other_formats_are_not_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy, decoded = opened(REFUSED[name]), opened(REFUSED[name])
    if name != "page.eps":
        decoded.load()
        assert pixels(load(decoded)) == pixels(decoded.convert("RGB"))
    monkeypatch.setattr(type(lazy), "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=str(lazy.format)) as caught:
        load(lazy)
    assert caught.value.__cause__ is None


# Arrays


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5, 3), np.float32), np.zeros((4, 5, 4), np.uint8), np.zeros((), np.uint8),
        np.zeros((4, 5, 3), [("r", "u1")]), np.array([[None]]),
    ],
    ids=lambda array: f"{array.dtype.name}-{array.shape}",
)  # fmt: skip
def test_arrays_of_another_kind_are_refused_by_dtype_and_shape(array: Any) -> None:
    with pytest.raises(ImageError) as caught:
        load(array)
    assert array.dtype.name in str(caught.value) and str(array.shape) in str(caught.value)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (np.zeros((5, 0, 3), np.uint8), "empty"),
        (np.zeros((4, 5, 3), np.uint8).view(np.ma.MaskedArray), "masked"),
        (np.broadcast_to(np.uint8(0), (100_000, 100_000, 3)), "max_pixels"),
    ],
    ids=["no-rows", "no-columns", "masked", "huge-view"],
)
def test_empty_masked_and_huge_arrays_are_refused(array: Any, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        load(array)


def test_views_and_read_only_arrays_load_and_nothing_is_shared() -> None:
    array = np.random.default_rng(1).integers(0, 256, (8, 6, 3), np.uint8)
    for view in (array, array[::-1, ::2], array[..., ::-1], np.asfortranarray(array)):
        assert np.array_equal(to_array(load(view)), view)
    frozen = array.copy()
    frozen.flags.writeable = False
    loaded = load(frozen)
    frozen.flags.writeable = True
    frozen[:] = 0
    assert np.array_equal(to_array(loaded), array)
    loaded.putpixel((0, 0), (1, 2, 3))
    assert not frozen.any()


def test_to_array_gives_a_writable_contiguous_copy_of_rgb_images_only() -> None:
    image = load(corners())
    array = to_array(image)
    assert array.shape == (32, 48, 3) and array.dtype == np.uint8
    assert array.flags.c_contiguous and array.flags.writeable and array.flags.owndata
    array[:] = 7
    assert image == load(corners())
    for wrong in (Image.new("L", (2, 2)), None, np.zeros((2, 2, 3), np.uint8)):
        with pytest.raises(ImageError, match=r"load\(\)"):
            to_array(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("image", [None, 3, ["a.png"], io.BytesIO(PNG), {"bytes": b""}, object()])
def test_other_types_are_named_and_refused(image: Any) -> None:
    with pytest.raises(ImageError, match=type(image).__name__):
        load(image)


def test_views_of_bytes_load_whatever_their_layout() -> None:
    doubled = bytes(value for byte in PNG for value in (byte, 0))
    assert load(memoryview(doubled)[::2]) == load(PNG)
    released = memoryview(PNG)
    released.release()
    with pytest.raises(ImageError) as caught:
        load(released)
    assert isinstance(caught.value.__cause__, ValueError)
