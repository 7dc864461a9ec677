"""Crafted image files for the tests: what must load, what must be refused, and how to build more.

`tests/data/images` holds one file per kind of failure that fuzzing found.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FUZZ = Path(__file__).parent / "data" / "images" / "fuzz"
WHITE = (255, 255, 255)
REFUSED_MODES = {"F", "LAB", "La"}
SIGNATURE = b"\x89PNG\r\n\x1a\n"
# How a camera held in orientation N stores a scene: the inverse of what a viewer applies.
STORED = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE",
                         "ROTATE_90", "TRANSVERSE", "ROTATE_270"), 2))  # fmt: skip


def pixels(image: Image.Image) -> list[Any]:
    return [tuple(pixel) for row in np.asarray(image).tolist() for pixel in row]


def opened(data: bytes) -> Any:
    """The file opened by Pillow, not decoded; its warnings are not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data))


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """48 x 32: four coloured quarters, so that every turn and flip of it looks different."""
    image = Image.new("RGB", (48, 32))
    for colour, box in {
        (255, 0, 0): (0, 0, 24, 16),
        (0, 255, 0): (24, 0, 48, 16),
        (0, 0, 255): (0, 16, 24, 32),
        (255, 255, 0): (24, 16, 48, 32),
    }.items():
        image.paste(colour, box)
    return image


def stored(orientation: int) -> Image.Image:
    how = STORED.get(orientation)
    return corners() if how is None else corners().transpose(Image.Transpose[how])


def image_of_mode(mode: str, size: tuple[int, int], noise: bytes = b"") -> Image.Image:
    """An image of any PIL mode with patterned pixels."""
    wanted = len(Image.new(mode, size).tobytes())
    pattern = noise or bytes(range(0, 256, 7))
    image = Image.frombytes(mode, size, (pattern * (wanted // len(pattern) + 1))[:wanted])
    if mode in ("P", "PA"):
        image.putpalette([value % 256 for value in range(0, 5 * 768, 5)])
    return image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    size: tuple[int, int], depth: int, colour: int, row: bytes, *extra: tuple[bytes, bytes]
) -> bytes:
    """A PNG file of one row of raw pixels, with extra chunks before the pixel data."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    data = zlib.compress(b"\0" + row)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")]
    return SIGNATURE + b"".join(chunk(kind, body) for kind, body in chunks)


def exif(orientation: int, order: str = "<") -> bytes:
    """The smallest EXIF block with an orientation."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(order + "H", 1) + entry + struct.pack(order + "I", 0)


def malformed_exif() -> dict[str, bytes]:
    good = exif(6)
    return {
        "cut": good[:20],
        "order": good.replace(b"II", b"XX"),
        "offset": good[:10] + b"\xff\xff\xff\xff" + good[14:],
        "nine": exif(9),
    }


def bmp(*pixels: tuple[int, int, int, int]) -> bytes:
    """A BMP file of one row of (blue, green, red, alpha)."""
    body = bytes(value for pixel in pixels for value in pixel)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 56, len(pixels), 1, 1, 32, 3, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 70 + len(body), 0, 0, 70) + header + masks + body


def scan_bomb(scans: int, side: int = 16) -> bytes:
    """A progressive JPEG whose last scan is repeated: tiny, yet a pass over all pixels each."""
    data = encode(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    start, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:end] + data[start:end] * scans + data[end:]


def resized_header(data: bytes, width: int, height: int) -> bytes:
    """The same file with a header that claims another size, checksums repaired."""
    if data.startswith(b"\xff\xd8"):
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
        return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]
    if data.startswith(SIGNATURE):
        header = struct.pack(">II", width, height) + data[24:29]
        return SIGNATURE + chunk(b"IHDR", header) + data[33:]
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<ii", width, height) + data[26:]
    return data[:26] + struct.pack("<HH", width, height) + data[30:]  # WebP, lossy


def accepted() -> dict[str, bytes]:
    small = corners().resize((12, 8), Image.Resampling.NEAREST)
    files: dict[str, bytes] = {}
    for orientation in range(1, 9):
        block = exif(orientation, "<" if orientation % 2 else ">")
        turned = stored(orientation)
        files[f"exif_{orientation}.jpg"] = encode(turned, "JPEG", quality=95, exif=block)
    files["exif_6.png"] = encode(stored(6), "PNG", exif=exif(6))
    after = png((2, 1), 8, 0, b"\x00\xff")
    files["exif_6_after_pixels.png"] = after[:-12] + chunk(b"eXIf", exif(6)[6:]) + after[-12:]
    files["exif_6.webp"] = encode(stored(6), "WEBP", lossless=True, exif=exif(6))
    for name, block in malformed_exif().items():
        files[f"exif_bad_{name}.jpg"] = encode(small, "JPEG", quality=95, exif=block)

    cmyk = encode(small.convert("CMYK"), "JPEG", quality=95)
    files["cmyk.jpg"] = cmyk
    adobe = cmyk.index(b"Adobe")
    files["ycck.jpg"] = cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :]
    files["grey.jpg"] = encode(small.convert("L"), "JPEG", quality=95)
    files["progressive.jpg"] = encode(small, "JPEG", quality=95, progressive=True)
    black = Image.new("RGB", (12, 8))
    files["phone.mpo"] = encode(small, "MPO", save_all=True, append_images=[black], quality=95)
    files["trailing_video.jpg"] = encode(small, "JPEG", quality=95) + b"\xff\xda\0\4ab" * 200

    palette, index = (b"PLTE", bytes((255, 0, 0, 0, 255, 0, 0, 0, 255))), bytes((0, 1, 2))
    files["palette.png"] = png((3, 1), 8, 3, index, palette)
    files["palette_key.png"] = png((3, 1), 8, 3, index, palette, (b"tRNS", b"\xff\0"))
    files["palette_alpha.png"] = png((3, 1), 8, 3, index, palette, (b"tRNS", b"\0\x80"))
    files["bilevel_key.png"] = png((8, 1), 1, 0, b"\x0f", (b"tRNS", b"\0\0"))
    files["grey8_key.png"] = png((3, 1), 8, 0, b"\0\5\x80", (b"tRNS", b"\0\5"))
    rgb = b"\1\2\3\4\5\6"
    files["rgb_key.png"] = png((2, 1), 8, 2, rgb, (b"tRNS", b"\0\1\0\2\0\3"))
    wide = struct.pack(">5H", 0, 128, 129, 32896, 65535)
    files["grey16.png"] = png((5, 1), 16, 0, wide)
    files["grey16_alpha.png"] = png((2, 1), 16, 4, struct.pack(">4H", 0x4000, 0xFFFF, 7, 0))
    files["rgba16.png"] = png((1, 1), 16, 6, struct.pack(">4H", 0x8000, 0, 0xFFFF, 0xFFFF))
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("PNG", "WEBP"):
        options = {"save_all": True, "append_images": frames[1:], "lossless": True}
        files[f"animated.{kind.lower()}"] = encode(frames[0], kind, **options)
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    clear.putpixel((1, 0), (10, 20, 30, 0))
    files["alpha.webp"] = encode(clear, "WEBP", lossless=True, exact=True)
    files["alpha.bmp"] = bmp((30, 20, 10, 255), (30, 20, 10, 0))
    files["alpha_all_zero.bmp"] = bmp((30, 20, 10, 0), (60, 50, 40, 0))
    return files


def refused() -> dict[str, bytes]:
    small = corners().resize((12, 8), Image.Resampling.NEAREST)
    plain = {kind.lower(): encode(small, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP")}
    files = {"empty.jpg": b"", "text.jpg": b"this is no image at all"}
    for extension, data in plain.items():
        files[f"half.{extension}"] = data[: len(data) // 2]
        files[f"huge.{extension}"] = resized_header(data, 16_000, 16_000)
    rgb = b"\1\2\3\4\5\6"
    files["zero_width.png"] = resized_header(plain["png"], 0, 8)
    files["zero_height.jpg"] = resized_header(plain["jpeg"], 12, 0)
    # Pillow stores text under its key, and reads some keys back as its own settings.
    files["text_transparency.png"] = png((2, 1), 8, 2, rgb, (b"tEXt", b"transparency\0some"))
    bomb = b"k\0\0" + zlib.compress(bytes(8 << 20), 9)
    files["text_bomb.png"] = png((2, 1), 8, 2, rgb, (b"zTXt", bomb))
    files["scans.jpg"] = scan_bomb(200)
    files["page.eps"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n"
    files["image.gif"] = encode(small.convert("P"), "GIF")
    files["image.tiff"] = encode(small, "TIFF")
    return files


ACCEPTED, REFUSED = accepted(), refused()
