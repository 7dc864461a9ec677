"""What must hold for any picture whatever, as hypothesis properties.

`tests/test_images.py` runs them with a few examples each. `make fuzz` and this run more:
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
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageFile

from molmo_edge import images
from molmo_edge.errors import ImageError
from molmo_edge.images_formats import orientation

EXAMPLES = int(os.environ.get("MOLMO_EDGE_FUZZ_EXAMPLES", "60"))
KEEP = os.environ.get("MOLMO_EDGE_FUZZ_KEEP")
DATA = Path(__file__).parent / "data" / "images"
LIMITS = images.ImageLimits(max_bytes=2**20, max_pixels=250_000)
MODES = sorted(set(Image.MODES) | {"I;16", "I;16B", "I;16L", "I;16N"})
REFUSED_MODES = {"F", "LAB"}
LAZY_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP"}
CPU_SECONDS = 5.0  # no picture within LIMITS may take longer, however it was crafted
CAUSES: Counter[tuple[str, str]] = Counter()

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = pytest.mark.timeout(60 + EXAMPLES)


def picture_of_mode(mode: str, size: tuple[int, int], noise: bytes = b"") -> Image.Image:
    """A picture of any PIL mode with patterned pixels."""
    empty = Image.new(mode, size)
    wanted = len(empty.tobytes())
    pattern = noise or bytes(range(0, 256, 7))
    data = (pattern * (wanted // len(pattern) + 1))[:wanted]
    picture = Image.frombytes(mode, size, data)
    if mode in ("P", "PA"):
        picture.putpalette([value % 256 for value in range(0, 5 * 768, 5)])
    return picture


def seeds() -> dict[str, bytes]:
    """Every mode in every format that can hold it, and all files under tests/data/images."""
    found: dict[str, bytes] = {}
    for mode in MODES:
        for file_format in ("JPEG", "PNG", "WEBP", "BMP"):
            for options in ({}, {"progressive": True, "lossless": True, "optimize": True}):
                buffer = io.BytesIO()
                try:
                    picture_of_mode(mode, (13, 9)).save(buffer, file_format, **options)
                except (OSError, ValueError):
                    continue  # this format cannot hold this mode
                found[f"{mode}-{file_format}-{len(options)}"] = buffer.getvalue()
    for path in sorted(DATA.rglob("*.*")):
        if path.suffix != ".py" and path.stat().st_size:
            found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    return found


SEEDS = seeds()
WHOLE = {name: data for name, data in SEEDS.items() if not name.startswith(("refused", "fuzz"))}

operations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "drop", "repeat", "insert", "number", "splice"]),
        st.floats(0, 1, exclude_max=True),  # where, as a share of the length
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
    """Puts right checksums on a damaged PNG, so that the damage gets past them."""
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
    """Loads `image` and checks what holds for every answer; None where it was refused."""
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture = images.load(image, LIMITS)
    except ImageError as error:
        message = str(error)
        assert "0x" not in message and "<" not in message and "b'" not in message
        assert not isinstance(error.__cause__, Warning), "PIL warned"
        assert error.__suppress_context__ == (error.__cause__ is not None)
        cause = type(error.__cause__).__name__ if error.__cause__ else "none"
        if KEEP and (label, cause) not in CAUSES and isinstance(image, bytes):
            (Path(KEEP) / f"{cause}.{label}").write_bytes(image)
        CAUSES[label, cause] += 1
        picture = None
    else:
        assert type(picture) is Image.Image
        assert picture.mode == "RGB" and picture.info == {} and picture.format is None
        assert 0 < picture.width * picture.height <= LIMITS.max_pixels
        assert images.to_array(picture).shape == (picture.height, picture.width, 3)
        CAUSES[label, "loaded"] += 1
    assert time.process_time() - started < CPU_SECONDS
    return picture


@fuzz
@given(name=st.sampled_from(sorted(SEEDS)), steps=operations, repair=st.booleans())
def test_damaged_files_load_or_are_image_errors(name: str, steps: Any, repair: bool) -> None:
    data = mutate(SEEDS[name], steps)
    label = {b"\xff": "jpg", b"\x89": "png", b"R": "webp", b"B": "bmp"}.get(data[:1], "bin")
    load_or_refuse(repair_png(data) if repair else data, label)


@fuzz
@given(name=st.sampled_from(sorted(WHOLE)), share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_image_errors(name: str, share: float) -> None:
    data = WHOLE[name]
    end = b"\xff\xd9" if data[:2] == b"\xff\xd8" else b"IEND\xaeB`\x82"
    if data[:1] in (b"\xff", b"\x89"):
        data = data[: data.index(end) + len(end)]  # what follows the end may be missing
    # The padding of the last BMP row and RLE's end mark (a run-length picture may be sparse) hold
    # no pixels; nothing else may be missing.
    if data[:2] == b"BM":
        data = data[:-4]
        if struct.unpack_from("<I", data, 30)[0] in (1, 2):
            return
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
    exif=st.one_of(st.none(), st.binary(max_size=60), st.text(max_size=5)),
)
def test_pil_images_of_any_mode_load_unchanged(
    mode: str, size: tuple[int, int], noise: bytes, key: Any, exif: Any
) -> None:
    given_image = picture_of_mode(mode, size, noise)
    for name, value in (("transparency", key), ("exif", exif)):
        if value is not None:
            given_image.info[name] = value
    palette = "RGBA" if mode in ("P", "PA") else None

    def state() -> tuple[Any, ...]:
        colours = given_image.getpalette(palette) if palette else None
        info = dict(given_image.info)
        return given_image.mode, given_image.size, info, given_image.tobytes(), colours

    before = state()
    picture = load_or_refuse(given_image, f"mode {mode}")
    assert state() == before
    if mode in REFUSED_MODES:
        assert picture is None
    elif mode != "I" and key is None:
        assert picture is not None


@fuzz
@given(name=st.sampled_from(sorted(SEEDS)), steps=operations)
def test_lazy_pil_images_load_like_their_bytes(name: str, steps: Any) -> None:
    data = mutate(SEEDS[name], steps[:1]) if len(steps) > 3 else SEEDS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lazy = Image.open(io.BytesIO(data))
        except Exception:
            return  # PIL cannot open it, so no caller can hand it in
    if lazy.width * lazy.height > LIMITS.max_pixels or lazy.format not in LAZY_FORMATS:
        assert load_or_refuse(lazy, "lazy") is None
        return
    file = lazy.fp
    assert file is not None
    position, tiles, info = file.tell(), list(lazy.tile), dict(lazy.info)
    picture = load_or_refuse(lazy, "lazy")
    from_bytes = load_or_refuse(data, "lazy")
    if from_bytes is not None:
        assert picture == from_bytes
        assert isinstance(lazy, ImageFile.ImageFile)
        assert (lazy.fp, lazy.tile, lazy.info) == (file, tiles, info)
        assert file.tell() == position


@fuzz
@given(block=st.binary(max_size=80), tiff=st.booleans(), order=st.sampled_from(["<", ">"]))
def test_any_exif_block_names_one_of_eight_orientations(
    block: bytes, tiff: bool, order: str
) -> None:
    if tiff:
        head = b"II*\0" if order == "<" else b"MM\0*"
        block = b"Exif\0\0" + head + struct.pack(order + "I", 8) + block
    assert orientation(block) in range(1, 9)


@fuzz
@given(
    value=st.integers(1, 8),
    tags=st.dictionaries(
        st.sampled_from([0x010E, 0x010F, 0x0110, 0x0131, 0x0132]), st.text("abc", max_size=9)
    ),
    order=st.sampled_from(["<", ">"]),
)
def test_orientations_written_by_pil_are_read_as_pil_reads_them(
    value: int, tags: dict[int, str], order: str
) -> None:
    exif = Image.Exif()
    exif.endian = order
    exif.update(tags)
    exif[0x0112] = value
    block = exif.tobytes()
    assert orientation(block) == value
    again = Image.Exif()
    again.load(block)
    assert again[0x0112] == value


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
    picture = load_or_refuse(array, "array")
    fits = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2:] == (3,) and array.size
    assert (picture is not None) == bool(fits)
    if picture is not None:
        assert np.array_equal(images.to_array(picture), before)
    assert np.array_equal(array, before, equal_nan=array.dtype.kind == "f")
