"""What holds for any image whatever, as hypothesis properties.

`tests/test_images.py` runs them with a few examples each, `make fuzz` with more:
``MOLMO_EDGE_FUZZ_EXAMPLES=10000 pytest tests/fuzz_images.py``. With ``MOLMO_EDGE_FUZZ_KEEP=DIR``
one file for each kind of failure (file format and cause) is written to DIR.
"""

from __future__ import annotations

import io
import os
import struct
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from molmo_edge import images
from molmo_edge.errors import ImageError
from tests.image_files import ACCEPTED, FUZZ, REFUSED, encode, image_of_mode

EXAMPLES = int(os.environ.get("MOLMO_EDGE_FUZZ_EXAMPLES", "60"))
KEEP = os.environ.get("MOLMO_EDGE_FUZZ_KEEP")
LIMITS = images.ImageLimits(max_bytes=2**20, max_pixels=250_000)
MODES = sorted(set(Image.MODES) | {"I;16", "I;16B", "I;16L", "I;16N"})
REFUSED_MODES = {"F", "LAB"}
LAZY_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP"}
CPU_SECONDS = 5.0  # no image within LIMITS may take longer, however it was crafted

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = pytest.mark.timeout(60 + EXAMPLES)

# A tag that Pillow may read, of any type, count and value or offset.
tiff_entry = st.builds(
    struct.pack,
    st.just(">HHII"),
    st.sampled_from([0x0112, 0x010E, 0x011A, 0x0128, 0x8769, 0x8825]),
    st.integers(0, 16),
    st.integers(0, 9) | st.integers(0, 2**32 - 1),
    st.integers(0, 9) | st.integers(0, 2**32 - 1) | st.integers(1, 8).map(lambda v: v << 16),
)


def seeds() -> dict[str, bytes]:
    """Every mode in every format that can hold it, and all crafted files."""
    files: dict[str, bytes] = {}
    for mode in MODES:
        for file_format in ("JPEG", "PNG", "WEBP", "BMP"):
            for options in ({}, {"progressive": True, "lossless": True, "optimize": True}):
                try:
                    data = encode(image_of_mode(mode, (13, 9)), file_format, **options)
                except (OSError, ValueError):
                    continue  # this format cannot hold this mode
                files[f"{mode}-{file_format}-{len(options)}"] = data
    return files | ACCEPTED


WHOLE = seeds()
BROKEN = REFUSED | {path.name: path.read_bytes() for path in sorted(FUZZ.iterdir())}
SEEDS = {name: data for name, data in (WHOLE | BROKEN).items() if data}

operations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "drop", "repeat", "insert", "number", "splice"]),
        st.floats(0, 1, exclude_max=True),  # where, as a fraction of the length
        st.integers(1, 255),
        st.binary(min_size=1, max_size=12),
        st.sampled_from(sorted(SEEDS)),
    ),
    min_size=1,
    max_size=6,
)


def mutate(data: bytes, steps: list[tuple[str, float, int, bytes, str]]) -> bytes:
    for how, share, amount, blob, other in steps:
        at = int(share * len(data))
        if how == "flip":
            data = data[:at] + bytes(b ^ amount for b in data[at : at + 1]) + data[at + 1 :]
        elif how == "set":
            data = data[:at] + blob + data[at + len(blob) :]
        elif how == "cut":
            data = data[:at]
        elif how == "drop":
            data = data[:at] + data[at + amount :]
        elif how == "repeat":
            data = data[:at] + data[at : at + amount] * 3 + data[at + amount :]
        elif how == "insert":
            data = data[:at] + blob + data[at:]
        elif how == "number":
            number = struct.pack(">I" if amount % 2 else "<I", 2 ** (amount % 33) - 1)
            data = data[:at] + number + data[at + 4 :]
        else:
            data = data[:at] + SEEDS[other][int(share * len(SEEDS[other])) :]
    return data


def repair_png(data: bytes) -> bytes:
    """Put right checksums on a damaged PNG, so that the damage gets past them."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    repaired, at = [data[:8]], 8
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        if at + 12 + length > len(data):
            break
        checksum = zlib.crc32(data[at + 4 : at + 8 + length])
        repaired += [data[at : at + 8 + length], struct.pack(">I", checksum)]
        at += 12 + length
    return b"".join([*repaired, data[at:]])


def load_or_refuse(image: Any, label: str = "?") -> Image.Image | None:
    """Load `image` and check what holds for every answer; None where it was refused."""
    started = time.process_time()
    loaded = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = images.load(image, LIMITS)
    except ImageError as error:
        message = str(error)
        assert "0x" not in message and "<" not in message and "b'" not in message
        assert error.__suppress_context__ == (error.__cause__ is not None)
        if KEEP and isinstance(image, bytes):
            (Path(KEEP) / f"{type(error.__cause__).__name__}.{label}").write_bytes(image)
    else:
        assert type(loaded) is Image.Image
        assert loaded.mode == "RGB" and loaded.info == {} and loaded.format is None
        assert 0 < loaded.width * loaded.height <= LIMITS.max_pixels
        assert images.to_array(loaded).shape == (loaded.height, loaded.width, 3)
    assert time.process_time() - started < CPU_SECONDS
    return loaded


@fuzz
@given(name=st.sampled_from(sorted(SEEDS)), steps=operations, repair=st.booleans())
def test_damaged_files_load_or_are_image_errors(name: str, steps: Any, repair: bool) -> None:
    data = mutate(SEEDS[name], steps)
    label = {b"\xff": "jpg", b"\x89": "png", b"R": "webp", b"B": "bmp"}.get(data[:1], "bin")
    load_or_refuse(repair_png(data) if repair else data, label)


@fuzz
@given(name=st.sampled_from(sorted(WHOLE)), share=st.floats(0, 0.999))
def test_files_with_pixels_missing_are_image_errors(name: str, share: float) -> None:
    data = WHOLE[name]
    if data[:2] == b"BM":
        # The padding of the last row holds no pixels, and a run-length image may be sparse.
        data = data[:-4]
        if struct.unpack_from("<I", data, 30)[0] in (1, 2):
            return
    # What follows the compressed pixels may be missing, and so may their checksum.
    if data[:1] == b"\xff":
        data = data[: data.index(b"\xff\xd9") - 4]
    if data[:1] == b"\x89":
        data = data[: data.rindex(b"IDAT") + 8]
    assert load_or_refuse(data[: int(share * len(data))], "cut") is None


@fuzz
@given(
    magic=st.sampled_from(
        [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\0\0\0WEBPVP8X", b"BM", b""]
    ),
    rest=st.binary(max_size=400),
)
def test_random_bytes_load_or_are_image_errors(magic: bytes, rest: bytes) -> None:
    load_or_refuse(magic + rest, "random")


@fuzz
@given(
    mode=st.sampled_from(MODES),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    noise=st.binary(min_size=1, max_size=64),
    key=st.one_of(
        st.none(),
        st.integers(-1, 70_000),
        st.binary(max_size=300),
        st.tuples(*[st.integers(0, 65_535)] * 3),
        st.text(max_size=4),
    ),
    exif=st.one_of(
        st.none(),
        st.binary(max_size=60),
        st.text(max_size=5),
        st.binary(max_size=80).map(lambda entries: b"Exif\0\0II*\0\x08\0\0\0" + entries),
        st.lists(tiff_entry, max_size=5).map(
            lambda entries: b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries)
        ),
    ),
)
def test_pil_images_of_any_mode_load_unchanged(
    mode: str, size: tuple[int, int], noise: bytes, key: Any, exif: Any
) -> None:
    image = image_of_mode(mode, size, noise)
    for name, value in (("transparency", key), ("exif", exif)):
        if value is not None:
            image.info[name] = value
    palette = "RGBA" if mode in ("P", "PA") else None

    def state() -> tuple[Any, ...]:
        colours = image.getpalette(palette) if palette else None
        return image.mode, image.size, dict(image.info), image.tobytes(), colours

    before = state()
    loaded = load_or_refuse(image, f"mode {mode}")
    assert state() == before
    if mode in REFUSED_MODES:
        assert loaded is None
    elif mode != "I" and key is None:
        assert loaded is not None


@fuzz
@given(name=st.sampled_from(sorted(SEEDS)), steps=operations)
def test_lazy_pil_images_load_like_their_bytes(name: str, steps: Any) -> None:
    data = mutate(SEEDS[name], steps[:1]) if len(steps) > 3 else SEEDS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lazy = Image.open(io.BytesIO(data))
        except Exception:
            return  # Pillow cannot open it, so no caller can hand it in
    if lazy.width * lazy.height > LIMITS.max_pixels or lazy.format not in LAZY_FORMATS:
        assert load_or_refuse(lazy, "lazy") is None
        return
    file = lazy.fp
    assert file is not None
    position, tiles, info = file.tell(), list(lazy.tile), dict(lazy.info)
    loaded, from_bytes = load_or_refuse(lazy, "lazy"), load_or_refuse(data, "lazy")
    if from_bytes is not None:
        assert loaded == from_bytes
        assert (lazy.fp, lazy.tile, lazy.info) == (file, tiles, info)
        assert file.tell() == position


@fuzz
@given(
    array=hnp.arrays(
        st.sampled_from([np.uint8, np.int8, np.uint16, np.float32, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    step=st.sampled_from([1, -1, 2]),
)
def test_arrays_load_only_as_height_width_three_of_uint8(array: Any, step: int) -> None:
    array = array[::step] if array.ndim else array
    before = array.copy()
    loaded = load_or_refuse(array, "array")
    fits = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2:] == (3,) and array.size
    assert (loaded is not None) == bool(fits)
    if loaded is not None:
        assert np.array_equal(images.to_array(loaded), before)
    assert np.array_equal(array, before, equal_nan=array.dtype.kind == "f")
