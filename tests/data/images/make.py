"""Writes the crafted picture files beside this script: `python tests/data/images/make.py`.

`accepted/` must load, `refused/` must be an ImageError. `fuzz/` is not written here: it holds one
file per kind of failure that fuzzing found, named for the exception: `door_` beneath our own door,
`pil_` where plain `Image.open`, `load`, `getexif` and `convert` raised or warned.

JPEG and WebP come out of Pillow's encoders, so their bytes may differ between Pillow versions.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    size: tuple[int, int],
    depth: int,
    colour: int,
    rows: list[bytes],
    before: tuple[tuple[bytes, bytes], ...] = (),
    after: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """A PNG out of raw rows, with extra chunks before and after the pixel data."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *before, (b"IDAT", pixels), *after, (b"IEND", b"")]
    return SIGNATURE + b"".join(chunk(kind, body) for kind, body in chunks)


def exif(orientation: int, order: str = "<") -> bytes:
    """The smallest EXIF block with an orientation."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(order + "H", 1) + entry + struct.pack(order + "I", 0)


def malformed_exif() -> dict[str, bytes]:
    good = exif(6)
    return {
        "empty": b"Exif\0\0",
        "cut": good[:20],
        "order": good.replace(b"II", b"XX"),
        "offset": good[:10] + b"\xff\xff\xff\xff" + good[14:],
        "entries": good[:14] + b"\xff\xff" + b"\1" * 30,
        "zero": exif(0),
        "nine": exif(9),
        "huge": exif(65535),
        "ascii": good.replace(struct.pack("<HHI", 0x112, 3, 1), struct.pack("<HHI", 0x112, 2, 1)),
        "many": good.replace(struct.pack("<HHI", 0x112, 3, 1), struct.pack("<HHI", 0x112, 3, 9)),
    }


def corners() -> Image.Image:
    """48 x 32: four coloured quarters, so that every turn and flip of it looks different."""
    picture = Image.new("RGB", (48, 32))
    for colour, box in {
        (255, 0, 0): (0, 0, 24, 16),
        (0, 255, 0): (24, 0, 48, 16),
        (0, 0, 255): (0, 16, 24, 32),
        (255, 255, 0): (24, 16, 48, 32),
    }.items():
        picture.paste(colour, box)
    return picture


# How a camera held in orientation N stores a scene: the inverse of what a viewer applies.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(orientation: int) -> Image.Image:
    how = STORED[orientation]
    return corners() if how is None else corners().transpose(how)


def encode(picture: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def bmp(
    size: tuple[int, int], bits: int, compression: int, body: bytes, colours: int = 0
) -> bytes:
    colour = [bytes((90 * index % 256, 30 * index % 256, 255, 0)) for index in range(colours)]
    palette = b"".join(colour)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) if compression == 3 else b""
    header_size = 56 if masks else 40
    offset = 14 + header_size + len(palette)
    header = struct.pack(
        "<IiiHHIIiiII", header_size, *size, 1, bits, compression, len(body), 0, 0, colours, 0
    )
    start = b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset)
    return start + header + masks + palette + body


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
    if data[12:16] == b"VP8 ":
        return data[:26] + struct.pack("<HH", width, height) + data[30:]
    raise ValueError("no header known for this file")


def accepted() -> dict[str, bytes]:
    small = corners().resize((12, 8), Image.Resampling.NEAREST)
    files: dict[str, bytes] = {}
    for orientation in range(1, 9):
        block = exif(orientation, "<" if orientation % 2 else ">")
        turned = stored(orientation)
        files[f"exif_{orientation}.jpg"] = encode(turned, "JPEG", quality=95, exif=block)
    files["exif_6.png"] = encode(stored(6), "PNG", exif=exif(6))
    files["exif_6_after_pixels.png"] = png(
        (1, 2), 8, 0, [b"\x00", b"\xff"], after=((b"eXIf", exif(6)[6:]),)
    )
    files["exif_6.webp"] = encode(stored(6), "WEBP", lossless=True, exif=exif(6))
    for name, block in malformed_exif().items():
        files[f"exif_bad_{name}.jpg"] = encode(small, "JPEG", quality=95, exif=block)

    cmyk = encode(small.convert("CMYK"), "JPEG", quality=95)
    files["cmyk.jpg"] = cmyk
    adobe = cmyk.index(b"Adobe")
    files["ycck.jpg"] = cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :]
    files["grey.jpg"] = encode(small.convert("L"), "JPEG", quality=95)
    files["progressive.jpg"] = encode(small, "JPEG", quality=95, progressive=True)
    files["phone.mpo"] = encode(
        small, "MPO", save_all=True, append_images=[Image.new("RGB", (12, 8))], quality=95
    )
    files["trailing_video.jpg"] = encode(small, "JPEG", quality=95) + b"\xff\xda\0\4ab" * 200

    palette = (b"PLTE", bytes((255, 0, 0, 0, 255, 0, 0, 0, 255)))
    index = [bytes((0, 1, 2))]
    palette_png = png((3, 1), 8, 3, index, (palette,))
    files["palette.png"] = palette_png
    files["palette_key.png"] = png((3, 1), 8, 3, index, (palette, (b"tRNS", b"\xff\0")))
    files["palette_alpha.png"] = png((3, 1), 8, 3, index, (palette, (b"tRNS", b"\0\x80")))
    files["palette_index_outside.png"] = png((3, 1), 8, 3, [bytes((0, 9, 255))], (palette,))
    files["bilevel.png"] = png((8, 1), 1, 0, [b"\x0f"])
    files["bilevel_key.png"] = png((8, 1), 1, 0, [b"\x0f"], ((b"tRNS", b"\0\0"),))
    files["grey2_key.png"] = png((4, 1), 2, 0, [b"\x1b"], ((b"tRNS", b"\xff\1"),))
    files["grey4_key.png"] = png((4, 1), 4, 0, [b"\x01\x2f"], ((b"tRNS", b"\0\2"),))
    files["grey8_key.png"] = png((3, 1), 8, 0, [b"\0\5\x80"], ((b"tRNS", b"\xff\5"),))
    files["rgb_key.png"] = png((2, 1), 8, 2, [b"\1\2\3\4\5\6"], ((b"tRNS", b"\0\1\0\2\0\3"),))
    wide = struct.pack(">5H", 0, 128, 129, 32896, 65535)
    files["grey16.png"] = png((5, 1), 16, 0, [wide])
    files["grey16_key.png"] = png((5, 1), 16, 0, [wide], ((b"tRNS", b"\0\x80"),))
    files["grey16_alpha.png"] = png((2, 1), 16, 4, [struct.pack(">4H", 0x4000, 0xFFFF, 7, 0)])
    files["rgb16_key.png"] = png(
        (2, 1), 16, 2, [struct.pack(">6H", 0x0102, 0x0304, 0x0506, 0x1111, 0x2222, 0x3333)],
        ((b"tRNS", struct.pack(">3H", 0x0102, 0x0304, 0x0506)),),
    )  # fmt: skip
    files["rgba16.png"] = png((1, 1), 16, 6, [struct.pack(">4H", 0x8000, 0, 0xFFFF, 0xFFFF)])
    # Keys under which PIL stores text and later reads back as its own settings.
    for key in ("transparency", "bbox", "interlace", "exif", "icc_profile", "default_image"):
        text = (b"tEXt", key.encode() + b"\0some text")
        files[f"text_{key}.png"] = png((2, 1), 8, 2, [b"\1\2\3\4\5\6"], (text,))
    files["text_bomb.png"] = png(
        (2, 1), 8, 2, [b"\1\2\3\4\5\6"],
        ((b"zTXt", b"k\0\0" + zlib.compress(bytes(8 << 20), 9)),),
    )  # fmt: skip
    files["text_bad_checksum.png"] = (
        palette_png[:33] + chunk(b"tEXt", b"a\0b")[:-4] + b"oops" + palette_png[33:]
    )
    files["animation_twice.png"] = png(
        (2, 1), 8, 2, [b"\1\2\3\4\5\6"], ((b"acTL", bytes(8)), (b"acTL", bytes(8)))
    )
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    files["animated.png"] = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    files["animated.webp"] = encode(
        frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True
    )
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    clear.putpixel((1, 0), (10, 20, 30, 0))
    files["alpha.webp"] = encode(clear, "WEBP", lossless=True, exact=True)
    files["alpha.bmp"] = bmp((2, 1), 32, 3, bytes((30, 20, 10, 255, 30, 20, 10, 0)))
    files["alpha_all_zero.bmp"] = bmp((2, 1), 32, 3, bytes((30, 20, 10, 0, 60, 50, 40, 0)))
    files["rle4.bmp"] = bmp((4, 2), 4, 2, b"\4\x12\0\0\4\x21\0\1", 16)
    files["rle8.bmp"] = bmp((4, 2), 8, 1, b"\4\1\0\0\4\2\0\1", 256)
    files["rgb555.bmp"] = bmp((2, 1), 16, 0, struct.pack("<HH", 0x7C00, 0x001F))
    return files


def refused() -> dict[str, bytes]:
    small = corners().resize((12, 8), Image.Resampling.NEAREST)
    plain = {
        "jpg": encode(small, "JPEG"),
        "png": encode(small, "PNG"),
        "webp": encode(small, "WEBP"),
        "bmp": encode(small, "BMP"),
    }
    files = {"empty.jpg": b"", "text.jpg": b"this is no picture at all"}
    for extension, data in plain.items():
        files[f"half.{extension}"] = data[: len(data) // 2]
        files[f"huge.{extension}"] = resized_header(data, 16_000, 16_000)
        files[f"magic_only.{extension}"] = data[:16]
    files["no_end.png"] = plain["png"][:-12]
    files["zero_width.png"] = resized_header(plain["png"], 0, 8)
    files["zero_height.jpg"] = resized_header(plain["jpg"], 12, 0)
    files["bad_checksum.png"] = plain["png"][:-14] + b"\0\0" + plain["png"][-12:]
    files["second_header.png"] = plain["png"][:33] + plain["png"][8:]
    files["no_palette.png"] = png((3, 1), 8, 3, [bytes((0, 1, 2))])
    files["odd_palette.png"] = png((3, 1), 8, 3, [bytes((0, 1, 2))], ((b"PLTE", b"1234"),))
    files["more_alpha_than_colours.png"] = png(
        (1, 1), 8, 3, [b"\0"], ((b"PLTE", b"123"), (b"tRNS", bytes(300)))
    )
    files["short_key.png"] = png((2, 1), 8, 2, [b"\1\2\3\4\5\6"], ((b"tRNS", b"\0\1"),))
    files["apple.png"] = SIGNATURE + chunk(b"CgBI", bytes(4)) + plain["png"][8:]
    files["unknown_critical.png"] = plain["png"][:33] + chunk(b"ABCD", b"") + plain["png"][33:]
    files["no_pixels.png"] = SIGNATURE + plain["png"][8:33] + chunk(b"IEND", b"")
    files["scans.jpg"] = scan_bomb(200)
    files["page.eps"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n"
    files["picture.gif"] = encode(small.convert("P"), "GIF")
    files["picture.tif"] = encode(small, "TIFF")
    return files


def main() -> None:
    for folder, files in (("accepted", accepted()), ("refused", refused())):
        (HERE / folder).mkdir(exist_ok=True)
        for name, data in files.items():
            (HERE / folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
