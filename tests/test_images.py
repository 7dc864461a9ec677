"""Loading images: files, paths, limits, errors, orientation, modes, PIL images and arrays."""

from __future__ import annotations

import base64
import io
import os
import struct
import time
import tracemalloc
from array import array as array_of
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge.errors import ImageError
from molmo_edge.images import MAX_JPEG_SCANS, MAX_SIDE_PX, ImageLimits, load, private_copy
from tests.image_files import (
    ACCEPTED,
    REFUSED,
    WHITE,
    chunk,
    corners,
    encode,
    opened,
    pixels,
    scan_bomb,
    stored,
)

PNG = encode(corners(), "PNG")
# Pillow warns about malformed metadata.
quiet = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The test may take at most a mebibyte."""
    tracemalloc.start()
    yield
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# Files


@quiet
@pytest.mark.parametrize("name", ACCEPTED)
def test_files_load_from_path_str_bytes_and_pil_alike(name: str, tmp_path: Path) -> None:
    data = ACCEPTED[name]
    path = tmp_path / name
    path.write_bytes(data)
    image = load(path)
    assert type(image) is Image.Image and image.mode == "RGB" and image.info == {}
    for same in (str(path), data, opened(data)):
        assert load(same) == image


def in_other_forms(data: bytes) -> list[Any]:
    """The bytes of a file as programs have them: buffers, OpenCV's and ROS's arrays, URLs."""
    array, text = np.frombuffer(data, np.uint8), base64.b64encode(data).decode()
    return [
        bytearray(data), memoryview(data), array_of("B", data), array_of("b", data),
        io.BytesIO(data), array, array[:, None], array.repeat(2)[::2],
        f"data:image/png;base64,{text}", f" DATA:;base64,{text.replace('+', '%2B')}\n",
    ]  # fmt: skip


def test_encoded_bytes_load_in_any_unambiguous_form() -> None:
    for form in in_other_forms(PNG):
        assert load(form) == load(PNG)
        with pytest.raises(ImageError, match="max_image_bytes"):
            load(form, ImageLimits(max_bytes=len(PNG) - 1))
    text = base64.b64encode(PNG).decode()
    for wrong in (text, text.encode()):
        with pytest.raises(ImageError, match="b64decode"):
            load(wrong)
    with pytest.raises(ImageError, match="could not read"):
        load("data:image/png;base64,A")


def test_a_private_copy_is_the_image_as_it_was() -> None:
    for name in ("alpha_all_zero.bmp", "exif_6.jpg", "animated.png"):
        image = opened(ACCEPTED[name])
        lazy, _, decoded = private_copy(image), image.load(), private_copy(image)
        image.paste(0, (0, 0, *image.size))
        assert load(lazy) == load(decoded) == load(ACCEPTED[name])
    for wrong in (None, "missing", 3):
        assert private_copy(wrong) is wrong  # type: ignore[arg-type]


@quiet
@pytest.mark.parametrize("name", REFUSED)
def test_refused_files_are_image_errors(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(REFUSED[name])
    for image in (path, REFUSED[name]):
        with pytest.raises(ImageError) as caught:
            load(image)
        assert (name in str(caught.value)) == (image is path)


def test_an_image_over_the_pixel_cap_is_refused_from_its_header(little_memory: None) -> None:
    for kind in ("jpeg", "png", "webp", "bmp"):
        with pytest.raises(ImageError, match=r"pixels|DecompressionBomb"):
            load(REFUSED[f"huge.{kind}"])


def test_files_decode_as_pillow_decodes_them() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (31, 17, 3), np.uint8)
    for file_format in ("PNG", "BMP", "WEBP"):
        data = encode(Image.fromarray(noise), file_format, lossless=True)
        assert np.array_equal(load(data), noise)
    for name in ("cmyk.jpg", "ycck.jpg", "grey.jpg", "progressive.jpg"):
        assert np.array_equal(load(ACCEPTED[name]), opened(ACCEPTED[name]).convert("RGB"))


def test_scans_up_to_the_limit_load_and_one_more_does_not() -> None:
    own = scan_bomb(0).count(b"\xff\xda")
    assert load(scan_bomb(MAX_JPEG_SCANS - own)).size == (16, 16)
    bomb = scan_bomb(MAX_JPEG_SCANS - own + 1)
    for image in (bomb, opened(bomb)):
        with pytest.raises(ImageError, match="scans"):
            load(image)


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
    # A thousand EXIF entries that share 60,000 bytes are never copied out one by one.
    head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1001)
    head += struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    head += b"".join(struct.pack("<HHII", 0x9000 + i, 3, 25_000, 12_100) for i in range(1000))
    image = stored(6)
    image.info["exif"] = head + bytes(52_000)
    assert pixels(load(image)) == pixels(corners())
    assert time.process_time() - started < 2


# Paths


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("no/such/image.png", "'no/such/image.png'"),
        (Path("a\u00a0\u3000b.png"), "'a\u00a0\u3000b.png'"),
        ("a\0b\x1b", "'a.b.'"),
        ("x" * 300, "'…x{200}'"),
    ],
)
def test_paths_that_cannot_be_read_are_named_with_their_cause(image: str, name: str) -> None:
    with pytest.raises(ImageError, match=f"^{name}: could not read the image file") as caught:
        load(image)
    assert isinstance(caught.value.__cause__, OSError | ValueError)


@pytest.mark.timeout(10)
def test_pipes_devices_and_directories_are_refused_without_blocking(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe.png", tmp_path / "link.png"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link, tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ImageError, match="regular file"):
            load(path)


def test_the_byte_cap_is_checked_before_reading(tmp_path: Path, little_memory: None) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(ImageLimits().max_bytes + 1)
    with pytest.raises(ImageError, match="bytes, the limit"):
        load(path)


# Limits


def test_limits_are_inclusive() -> None:
    load(PNG, ImageLimits(max_bytes=len(PNG), max_pixels=48 * 32))
    for image in (PNG, opened(PNG)):
        with pytest.raises(ImageError, match="max_image_bytes"):
            load(image, ImageLimits(max_bytes=len(PNG) - 1))
    for image in (PNG, corners(), np.asarray(corners()), opened(PNG)):
        with pytest.raises(ImageError, match="max_image_pixels"):
            load(image, ImageLimits(max_pixels=48 * 32 - 1))


def test_a_long_side_is_refused_however_few_pixels_there_are(little_memory: None) -> None:
    head = struct.pack(">IIBBBBB", 1, 64_000_000, 8, 0, 0, 0, 0)
    png = PNG[:8] + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    for image in (png, np.broadcast_to(np.uint8(0), (MAX_SIDE_PX + 1, 1, 3))):
        with pytest.raises(ImageError, match="limit of a side is 65535"):
            load(image)


def test_the_limit_of_pillow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"PIL\.Image\.MAX_IMAGE_PIXELS"):
        load(PNG)


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
        assert np.abs(np.asarray(loaded).astype(int) - expected).mean() < 6
        assert load(loaded) == loaded
    for name in (f"exif_{orientation}.{kind}" for kind in ("png", "webp")):
        if name in ACCEPTED:
            assert pixels(load(ACCEPTED[name])) == pixels(corners())


@quiet
@pytest.mark.parametrize("name", [name for name in ACCEPTED if name.startswith("exif_bad")])
def test_malformed_exif_counts_as_upright(name: str) -> None:
    upright = np.asarray(corners().resize((12, 8), Image.Resampling.NEAREST))
    assert load(ACCEPTED[name]).size == (12, 8)
    assert np.abs(np.asarray(load(ACCEPTED[name])).astype(int) - upright).mean() < 30


# Transparency and depth


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("palette.png", [(255, 0, 0), (0, 255, 0), (0, 0, 255)]),
        ("palette_key.png", [(255, 0, 0), WHITE, (0, 0, 255)]),
        ("palette_alpha.png", [WHITE, (127, 255, 127), (0, 0, 255)]),
        ("bilevel_key.png", [WHITE] * 8),
        ("grey8_key.png", [(0,) * 3, WHITE, (128,) * 3]),
        ("rgb_key.png", [WHITE, (4, 5, 6)]),
        ("rgba16.png", [(0x80, 0, 0xFF)]),
        ("grey16.png", [(0,) * 3, (0,) * 3, (1,) * 3, (128,) * 3, WHITE]),
        ("grey16_alpha.png", [(0x40,) * 3, WHITE]),
        ("exif_6_after_pixels.png", [(0, 0, 0), WHITE]),
        ("animated.png", [(255, 0, 0)] * 24),
        ("animated.webp", [(255, 0, 0)] * 24),
        ("alpha.webp", [(10, 20, 30), WHITE]),
        ("alpha.bmp", [(10, 20, 30), WHITE]),
        ("alpha_all_zero.bmp", [(10, 20, 30), (40, 50, 60)]),
    ],
)
def test_transparency_is_white_and_depth_is_scaled(name: str, expected: list[Any]) -> None:
    assert pixels(load(ACCEPTED[name])) == expected


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L", "I;16N"])
def test_sixteen_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    values = [0, 128, 129, 256, 257, 32767, 65406, 65407, 65535]
    image = Image.new(mode, (len(values), 1))
    for column, value in enumerate(values):
        image.putpixel((column, 0), value)
    assert [pixel[0] for pixel in pixels(load(image))] == [round(value / 257) for value in values]
    for value in (-1, 65536, 2**31 - 1):
        with pytest.raises(ImageError, match=r"0\.\.65535"):
            load(Image.new("I", (2, 2), value))


# PIL images and arrays


@pytest.mark.parametrize("name", ["animated.png", "animated.webp", "phone.mpo"])
def test_a_later_frame_is_the_one_the_caller_chose(name: str) -> None:
    lazy = opened(ACCEPTED[name])
    lazy.seek(1)
    assert pixels(load(lazy)) != pixels(load(ACCEPTED[name]))
    assert pixels(load(lazy)) == pixels(lazy.convert("RGB"))


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
    lazy = opened(REFUSED[name])
    monkeypatch.setattr(type(lazy), "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=str(lazy.format)):
        load(lazy)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        *((url, "fetches nothing") for url in ("http://host/a.png", "  HTTPS://host/a", "")),
        *((url, "fetches nothing") for url in ("file:///etc/a", "data:image/png,A")),
        (None, "type NoneType"),
        (["a.png"], "type list"),
        (np.zeros((4, 5, 3), np.float32), r"float32 of shape \(4, 5, 3\)"),
        (np.zeros((4, 5, 4), np.uint8), r"uint8 of shape \(4, 5, 4\)"),
        (np.array([[None]]), "object"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (np.broadcast_to(np.uint8(0), (100_000, 100_000, 3)), "max_image_pixels"),
    ],
)
def test_urls_other_types_and_arrays_are_refused(image: Any, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        load(image)


def test_views_and_read_only_arrays_load_and_nothing_is_shared() -> None:
    array = np.random.default_rng(1).integers(0, 256, (8, 6, 3), np.uint8)
    for view in (array, array[::-1, ::2], array[..., ::-1], np.asfortranarray(array)):
        assert np.array_equal(load(view), view)
    frozen = array.copy()
    frozen.flags.writeable = False
    for source in (frozen, corners()):
        load(source).paste((1, 2, 3), (0, 0, 4, 4))
    assert np.array_equal(frozen, array) and source == corners()
