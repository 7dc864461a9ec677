"""What holds for any image: an RGB image or an ImageError, in bounded memory and time.

``make fuzz`` tries many more examples.
"""

from __future__ import annotations

import io
import os
import struct
import time
import warnings
import zlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo_edge.errors import ImageError
from molmo_edge.images import ImageLimits, load
from tests.image_files import (
    ACCEPTED,
    FUZZ,
    REFUSED,
    REFUSED_MODES,
    encode,
    image_of_mode,
    malformed_exif,
)

EXAMPLES = int(os.environ.get("MOLMO_EDGE_FUZZ_EXAMPLES", "60"))
LIMITS = ImageLimits(max_bytes=2**20, max_pixels=250_000)
MODES = sorted(set(Image.MODES) | {"I;16", "I;16B", "I;16L", "I;16N"})
CPU_SECONDS = 5.0  # no image within LIMITS may take longer, however it was crafted

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = pytest.mark.timeout(60 + EXAMPLES)


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


FOUND = {path.name: path.read_bytes() for path in sorted(FUZZ.iterdir())}
SEEDS = {name: data for name, data in (seeds() | REFUSED | FOUND).items() if data}

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "repeat", "insert", "overwrite", "splice"]),
        st.floats(0, 1, exclude_max=True),  # where, as a fraction of the length
        st.integers(1, 255),
        st.binary(min_size=1, max_size=12) | st.just(b"\xff\xff\xff\xff"),
        st.sampled_from(sorted(SEEDS)),
    ),
    min_size=1,
    max_size=6,
)


def mutate(data: bytes, steps: list[tuple[str, float, int, bytes, str]]) -> bytes:
    for how, fraction, amount, blob, other in steps:
        at = int(fraction * len(data))
        head, tail = data[:at], data[at:]
        data = (
            head
            + {
                "flip": bytes(byte ^ amount for byte in tail[:1]) + tail[1:],
                "cut": b"",
                "repeat": tail[:amount] * 3 + tail[amount:],
                "insert": blob + tail,
                "overwrite": blob + tail[len(blob) :],
                "splice": SEEDS[other][int(fraction * len(SEEDS[other])) :],
            }[how]
        )
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


def load_or_refuse(image: Any) -> Image.Image | None:
    """Load `image` and check what holds for every answer; None where it was refused."""
    started = time.process_time()
    loaded = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load(image, LIMITS)
    except ImageError as error:
        message = str(error)
        assert "0x" not in message and "<" not in message and "b'" not in message
        assert error.__suppress_context__ == (error.__cause__ is not None)
    else:
        assert type(loaded) is Image.Image
        assert loaded.mode == "RGB" and loaded.info == {} and loaded.format is None
        assert 0 < loaded.width * loaded.height <= LIMITS.max_pixels
    assert time.process_time() - started < CPU_SECONDS
    return loaded


@pytest.mark.parametrize("name", FOUND)
def test_files_found_by_fuzzing_stay_harmless(name: str) -> None:
    load_or_refuse(FOUND[name])


@fuzz
@given(name=st.sampled_from(sorted(SEEDS)), steps=STEPS, repair=st.booleans())
def test_damaged_files_load_or_are_image_errors(name: str, steps: Any, repair: bool) -> None:
    data = mutate(SEEDS[name], steps)
    data = repair_png(data) if repair else data
    loaded = load_or_refuse(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lazy = Image.open(io.BytesIO(data))
        except Exception:
            return  # Pillow cannot open it, so no caller can hand it in
    assert load_or_refuse(lazy) == loaded


INFO = st.fixed_dictionaries(
    {},
    optional={
        "transparency": st.one_of(
            st.integers(-1, 70_000),
            st.binary(max_size=300),
            st.tuples(*[st.integers(0, 65_535)] * 3),
            st.text(max_size=4),
        ),
        "exif": st.binary(max_size=60) | st.sampled_from(sorted(malformed_exif().values())),
    },
)


@fuzz
@given(
    mode=st.sampled_from(MODES),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    noise=st.binary(min_size=1, max_size=64),
    info=INFO,
)
def test_pil_images_of_any_mode_load_unchanged(
    mode: str, size: tuple[int, int], noise: bytes, info: Any
) -> None:
    image = image_of_mode(mode, size, noise)
    image.info.update(info)
    palette = "RGBA" if mode in ("P", "PA") else None

    def state() -> tuple[Any, ...]:
        colours = image.getpalette(palette) if palette else None
        return image.mode, image.size, dict(image.info), image.tobytes(), colours

    before = state()
    loaded = load_or_refuse(image)
    assert state() == before
    if mode in REFUSED_MODES:
        assert loaded is None
    elif mode != "I" and "transparency" not in info:
        assert loaded is not None
