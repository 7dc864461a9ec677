"""The one door for pictures: files, paths, limits and the process around it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from molmo_edge.errors import ConfigError, ImageError
from molmo_edge.images import ImageLimits, load, to_array
from molmo_edge.images_formats import MAX_JPEG_SCANS
from tests import fuzz_images
from tests.data.images import make
from tests.picture_files import ACCEPTED, DATA, REFUSED, files, opened, pixels, png

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
    try:
        assert load(make.encode(picture, "WEBP")).size == (48, 32)
    except ImageError as error:  # newer Pillow checks WebP inside its decoder
        assert "MAX_IMAGE_PIXELS" in str(error)
        assert isinstance(error.__cause__, Image.DecompressionBombError)


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
def test_fuzz(holds: Callable[[], None]) -> None:
    holds()


def test_fuzzing_starts_from_every_mode_and_format() -> None:
    made = {tuple(name.split("-")[:2]) for name in fuzz_images.SEEDS if "-" in name}
    assert {"JPEG", "PNG", "WEBP", "BMP"} == {file_format for _, file_format in made}
    assert len(made) >= 20
