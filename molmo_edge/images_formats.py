"""JPEG, PNG, WebP and BMP files as bytes, before any decoder sees them.

`clean` names the format by its first bytes and, for JPEG and PNG, keeps only the parts that decide
what the picture looks like. A decoder therefore never parses comments, colour profiles, animation
or EXIF, and what it does parse is bounded by the size of the file. `orientation` reads the one EXIF
tag that matters. This module knows nothing about pixels and decodes none.

Sources: ITU-T T.81 annex B (JPEG markers), the W3C PNG specification (chunks, `tRNS`), TIFF 6.0 and
CIPA DC-008 (EXIF, tag 0x0112).
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

from molmo_edge.errors import ImageError

# A progressive scan costs a pass over the whole picture however few bytes it has, so a small file
# could ask for hours. Encoders write at most a few dozen.
MAX_JPEG_SCANS = 100
MAX_JPEG_SEGMENTS = 10_000

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_PREFIX = b"Exif\0\0"
_ORIENTATION = 0x0112
# Every marker but the ones that belong to entropy-coded data: stuffed zeros and restarts.
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_TEM, _SOI, _EOI, _SOS, _APP0, _APP1, _APP14, _APP15, _COM = (
    0x01, 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE,
)  # fmt: skip


class Container(NamedTuple):
    """A picture file, ready for one decoder.

    Attributes:
        format: ``"JPEG"``, ``"PNG"``, ``"WEBP"`` or ``"BMP"``.
        data: what to decode; for JPEG and PNG without anything that does not change pixels.
        exif: the EXIF block where it was found on the way, else None.
    """

    format: str
    data: bytes
    exif: bytes | None


def clean(data: bytes) -> Container:
    """Names the format of `data` and drops what no decoder needs to see.

    Raises:
        ImageError: it is none of the four formats, is cut short, or a checksum is wrong.
    """
    if not data:
        raise ImageError("the picture is empty (0 bytes)")
    if data.startswith(b"\xff\xd8\xff"):
        return _clean_jpeg(data)
    if data.startswith(_PNG_SIGNATURE):
        return _clean_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Container("WEBP", data, None)
    if data.startswith(b"BM"):
        return Container("BMP", data, None)
    raise ImageError(
        "the data is not a JPEG, PNG, WebP or BMP picture; convert it to one of these first"
    )


def orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) when it is absent or the block is malformed."""
    while exif.startswith(_EXIF_PREFIX):
        exif = exif[len(_EXIF_PREFIX) :]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", exif, entry)
            if tag == _ORIENTATION:
                if count != 1 or kind not in (3, 4):
                    return 1
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _clean_jpeg(data: bytes) -> Container:
    kept = [data[:2]]
    exif: bytes | None = None
    at, scans, segments = 2, 0, 0
    while True:
        marker = _JPEG_MARKER.search(data, at)
        if marker is None:
            raise ImageError("the JPEG data is cut short: its end marker is missing")
        kind, start = marker[1][0], marker.start()
        if scans:
            kept.append(data[at:start])  # entropy-coded data; before the first scan it is junk
        if kind == _EOI:
            # What follows is not this picture: further MPO frames, a phone's video, a gain map.
            kept.append(data[start : start + 2])
            return Container("JPEG", b"".join(kept), exif)
        segments += 1
        if kind in (_TEM, _SOI):
            end = start + 2
        else:
            length = int.from_bytes(data[start + 2 : start + 4], "big")
            end = start + 2 + length
            if length < 2 or end > len(data):
                raise ImageError("the JPEG data is damaged or cut short inside a segment")
        scans += kind == _SOS
        if scans > MAX_JPEG_SCANS or segments > MAX_JPEG_SEGMENTS:
            raise ImageError(
                f"the JPEG data has more than {MAX_JPEG_SCANS} scans or {MAX_JPEG_SEGMENTS} "
                "segments, which no camera writes; encode the picture again"
            )
        if kind == _APP1 and exif is None and data[start + 4 : end].startswith(_EXIF_PREFIX):
            exif = data[start + 4 : end]
        # JFIF (APP0) and Adobe (APP14) say which colour space the components are in.
        if kind in (_APP0, _APP14) or not (_APP0 <= kind <= _APP15 or kind == _COM):
            kept.append(data[start:end])
        at = end


def _clean_png(data: bytes) -> Container:
    chunks: dict[bytes, bytes] = {}
    pixels: list[bytes] = []
    exif: bytes | None = None
    at = len(_PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        header = data[at : at + 8]
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        body = data[at + 8 : at + 8 + length]
        checksum = data[at + 8 + length : at + 12 + length]
        if len(header) < 8 or len(body) < length or len(checksum) < 4:
            raise ImageError("the PNG data is cut short")
        if (kind == b"IHDR") != (at == len(_PNG_SIGNATURE)):
            raise ImageError("the PNG data is damaged: it must start with its one header")
        at += 12 + length
        intact = zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(checksum, "big")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            if not intact:
                raise ImageError("the PNG data is damaged: a checksum does not match")
            if kind == b"IDAT":
                pixels.append(body)
            else:
                chunks.setdefault(kind, body)
        elif kind == b"eXIf" and intact:
            exif = body
        elif not kind[0] & 0x20:
            raise ImageError("the PNG data is damaged or uses an extension that is not standard")
    chunks[b"IDAT"] = b"".join(pixels)
    _check_png(chunks)
    kept = [_PNG_SIGNATURE]
    for kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
        if kind in chunks:
            body = chunks[kind]
            checksum_value = zlib.crc32(body, zlib.crc32(kind))
            kept += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", checksum_value)]
    return Container("PNG", b"".join(kept), exif)


def _check_png(chunks: dict[bytes, bytes]) -> None:
    """Refuses contradictory chunks; rewrites a transparent colour to the samples PIL will hold."""
    header = chunks[b"IHDR"]
    if len(header) != 13:
        raise ImageError("the PNG data is damaged: its header has the wrong length")
    depth, colour = header[8], header[9]
    palette, alpha = chunks.get(b"PLTE"), chunks.get(b"tRNS")
    if colour == 3:
        if not palette or len(palette) % 3 or len(palette) > 768:
            raise ImageError("the PNG data is damaged: its palette is missing or malformed")
        if alpha is not None and len(alpha) > len(palette) // 3:
            raise ImageError("the PNG data is damaged: it has more alpha values than colours")
    else:
        chunks.pop(b"PLTE", None)  # only a hint for quantising
    if alpha is None or colour == 3:
        return
    if len(alpha) != {0: 2, 2: 6}.get(colour):
        raise ImageError("the PNG data is damaged: its transparent colour does not fit its type")
    samples = struct.unpack(f">{len(alpha) // 2}H", alpha)
    if depth == 16 and colour == 2:
        samples = tuple(sample >> 8 for sample in samples)  # PIL keeps the high byte of RGB
    elif depth < 16:
        # Only the low bits count; PIL stretches 2- and 4-bit grey to 8 bits, 1-bit it does itself.
        stretch = {2: 85, 4: 17}.get(depth, 1)
        samples = tuple((sample & ((1 << depth) - 1)) * stretch for sample in samples)
    chunks[b"tRNS"] = struct.pack(f">{len(samples)}H", *samples)
