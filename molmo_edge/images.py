"""Load any supported input as an upright 8-bit RGB image.

Images are untrusted: bytes and pixels are capped before anything is decoded, only JPEG, PNG, WebP
and BMP are decoded, and nothing is ever fetched. Pillow decodes, in this order of steps:

- Only the first frame counts. Colour profiles and gamma are ignored.
- Transparency (alpha, palette alpha, a transparent colour) is composited on white.
- 16-bit grey is scaled to 8 bits, ``round(value / 257)``; other modes are converted by Pillow.
- The EXIF orientation is applied; malformed EXIF counts as upright.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    ExifTags,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from molmo_edge.errors import ConfigError, ImageError

ImageLike: TypeAlias = (
    bytes | bytearray | memoryview | Path | str | Image.Image | npt.NDArray[np.uint8]
)

# What Pillow, zlib and the operating system raise over damaged, hostile or missing images, as
# found by fuzzing; `Warning` where the application turns warnings into errors.
FOREIGN_ERRORS: Final[tuple[type[Exception], ...]] = (
    OSError, SyntaxError, TypeError, ValueError, EOFError, MemoryError, struct.error, zlib.error,
    Image.DecompressionBombError, Warning,
)  # fmt: skip

# The classes that `Image.open(formats=…)` would choose from. It warns about a large image before
# our own cap can refuse it, and about an MPO file, of which only the first JPEG counts here.
_DECODERS: Final[dict[bytes, type[ImageFile.ImageFile]]] = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
}
_LAZY_FORMATS: Final = frozenset({"JPEG", "MPO", "PNG", "WEBP", "BMP"})
_URL = re.compile(r"\s*([a-z][a-z0-9+.-]*://|(data|file|https?|ftp):)", re.IGNORECASE)

# Each scan of a progressive JPEG file costs a pass over the whole image however few bytes it has,
# joining EXIF blocks takes quadratic time, and each segment costs Pillow some Python. Cameras write
# a few dozen. Random bytes, such as a video after the image, hardly ever match the patterns.
MAX_JPEG_SCANS: Final = 100
_JPEG_LIMITS: Final = (
    (re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\x01-\x04]"), MAX_JPEG_SCANS, "scans"),
    (re.compile(rb"Exif\0\0"), 100, "EXIF blocks"),
    (re.compile(rb"\xff[\xc0-\xcf\xda-\xfe]\0"), 10_000, "segments"),
)

_GREY16: Final = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_WITH_ALPHA: Final = frozenset({"LA", "La", "P", "PA", "RGBA", "RGBa"})
_OPAQUE: Final = frozenset({"1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})


@dataclass(frozen=True)
class ImageLimits:
    """Caps checked before an image is decoded.

    Attributes:
        max_bytes: of the encoded file; does not apply to arrays and decoded PIL images.
        max_pixels: width x height. Decoding and converting takes 8 (JPEG, PNG without alpha) to 20
            (WebP with alpha) bytes of memory per pixel at its peak, measured with Pillow 13.

    Raises:
        ConfigError: a cap is not a positive integer.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"ImageLimits.{field.name} must be a positive integer")


DEFAULT_LIMITS: Final = ImageLimits()


def load(image: ImageLike, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Return a new, upright, 8-bit RGB image.

    Args:
        image: one of

            - ``bytes``, ``bytearray``, ``memoryview``: a whole JPEG, PNG, WebP or BMP file;
            - ``Path`` or ``str``: a path to such a file. A ``str`` is never a URL. Directories,
              pipes and devices are refused without being opened;
            - ``numpy.ndarray``: uint8, shape (height, width, 3), channels in RGB order. OpenCV
              frames are BGR, which cannot be told from RGB: pass ``frame[..., ::-1]``;
            - ``PIL.Image.Image``: any mode but ``F`` and ``LAB``; mode ``I`` only within 0..65535.
              One that was opened but not decoded yet must be JPEG (MPO), PNG, WebP or BMP.
        limits: caps on bytes and pixels.

    Returns:
        An image of mode ``RGB`` with empty ``info`` that shares no memory with `image`. Its
        ``size`` is (width, height) after the EXIF rotation: the size that points refer to.

    Raises:
        ImageError: the image cannot be used; where something else failed, it is the cause.

    The caller's image is left as it is. A PIL image that was not decoded yet is decoded a second
    time from its own file, whose position is put back; so share it between threads only after its
    ``load()``. If it was moved to a later frame or had ``draft()`` called, it is decoded in place.
    EXIF is read from ``info``, which Pillow keeps through ``rotate`` and ``resize``: after turning
    an image by hand, delete ``info["exif"]``. Pillow may warn about malformed metadata.
    """
    if isinstance(image, Image.Image):
        return _from_pil(image, limits)
    if isinstance(image, np.ndarray):
        return _from_array(image, limits)
    if isinstance(image, (bytes, bytearray, memoryview)):
        with _translated("read the bytes of the image"):
            _check_bytes(memoryview(image).nbytes, limits)
            data = bytes(image)
        return _decode(_open(data, limits))
    if isinstance(image, (str, Path)):
        return _decode(_open(_read_file(image, limits), limits))
    raise ImageError(
        f"an image cannot be of type {type(image).__name__}; pass the bytes of a file, a path, a "
        "PIL image or a uint8 array of shape (height, width, 3)"
    )


def to_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the pixels of an RGB image: uint8, shape (height, width, 3), a contiguous copy.

    Raises:
        ImageError: `image` is not a PIL image of mode ``RGB``; use `load` first.
    """
    if not isinstance(image, Image.Image) or image.mode != "RGB":
        raise ImageError("only a PIL image of mode RGB has an RGB array; pass it to load() first")
    with _translated("read the pixels of the image"):
        return np.array(image, dtype=np.uint8, order="C")


@contextmanager
def _translated(action: str) -> Iterator[None]:
    """Translate errors of Pillow and the operating system into `ImageError`.

    Their messages stay in the cause: they can hold addresses, file names and pieces of the file.
    """
    try:
        yield
    except ImageError:  # which is a ValueError
        raise
    except FOREIGN_ERRORS as exc:
        raise ImageError(
            f"could not {action} ({type(exc).__name__}); the cause is chained to this error"
        ) from exc


def _check_bytes(size: int, limits: ImageLimits) -> None:
    if size > limits.max_bytes:
        raise ImageError(
            f"the image has more than {limits.max_bytes} bytes, the limit; send a smaller file "
            "or raise ImageLimits.max_bytes"
        )


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"the image is empty: {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"the image has {width} x {height} pixels, the limit is {limits.max_pixels} in all; "
            "send a smaller one or raise ImageLimits.max_pixels"
        )


def _read_file(path: str | Path, limits: ImageLimits) -> bytes:
    if isinstance(path, str) and (not path or _URL.match(path)):
        raise ImageError(
            "a str must be the path of an image file, not a URL and not empty: molmo_edge fetches "
            "nothing; download the image and pass its bytes"
        )
    with _translated("read the image file"):
        name = os.fspath(path)
        _check_regular(Path(name).stat().st_mode)  # opening a device can already have effects
        # A pipe put there since then neither blocks this open nor passes the second check.
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            info = os.fstat(file.fileno())
            _check_regular(info.st_mode)
            _check_bytes(info.st_size, limits)
            return file.read(info.st_size)


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ImageError("the path names a directory, pipe or device; an image is a regular file")


def _open(data: bytes, limits: ImageLimits) -> ImageFile.ImageFile:
    """Read the header only; the image is within the limits and not decoded."""
    _check_bytes(len(data), limits)
    decoder = next((kind for start, kind in _DECODERS.items() if data.startswith(start)), None)
    if decoder is None:
        raise ImageError(
            "the data is empty or not a JPEG, PNG, WebP or BMP image; convert it to one of these"
        )
    if decoder is JpegImagePlugin.JpegImageFile:
        for pattern, limit, name in _JPEG_LIMITS:
            if next(itertools.islice(pattern.finditer(data), limit, None), None):
                raise ImageError(
                    f"the JPEG data has more than {limit} {name}, which no camera writes; encode "
                    "the image again"
                )
    with _translated("read the header of the image"):
        image = decoder(io.BytesIO(data))
    _check_size(image.size, limits)
    return image


def _decode(image: ImageFile.ImageFile) -> Image.Image:
    with _translated(f"decode the {image.format} data, which is damaged or cut short"):
        image.load()
        # Many writers of BMP leave the fourth byte zero; such an image would show nothing.
        if image.format == "BMP" and image.mode == "RGBA":
            if image.getchannel("A").getextrema() == (0, 0):
                image.putalpha(255)
    return _upright_rgb(image)


def _from_array(array: npt.NDArray[Any], limits: ImageLimits) -> Image.Image:
    if isinstance(array, np.ma.MaskedArray):
        raise ImageError("a masked array has no agreed colour under its mask; fill it first")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"expected a uint8 array of shape (height, width, 3) in RGB order, got "
            f"{array.dtype.name} of shape {array.shape}; scale it to 0..255, put the channels "
            "last, drop an alpha channel or repeat grey three times"
        )
    height, width = array.shape[:2]
    _check_size((width, height), limits)
    with _translated("copy the array"):
        return Image.frombytes("RGB", (width, height), np.ascontiguousarray(array))


def _from_pil(image: Image.Image, limits: ImageLimits) -> Image.Image:
    _check_size(image.size, limits)
    # WebP has no tile before it is decoded, but no pixel memory either.
    if isinstance(image, ImageFile.ImageFile) and (image.tile or image._im is None):
        if image.format not in _LAZY_FORMATS:
            raise ImageError(
                f"a PIL image of format {image.format} that was not decoded yet is refused; only "
                "JPEG, PNG, WebP and BMP are decoded here, call its load() first if you trust it"
            )
        again = _reopen(image, limits)
        if again is not None:
            return _decode(again)
    with _translated("read the PIL image, which may be closed or damaged"):
        image.load()
        # Converting a palette image writes its alpha into it.
        image = image.copy() if image.mode == "P" else image
    return _upright_rgb(image)


def _reopen(image: ImageFile.ImageFile, limits: ImageLimits) -> ImageFile.ImageFile | None:
    """Open the file of a lazy `image` again; None where that would show something else."""
    with _translated("read the file of the PIL image, which may be closed"):
        if image.tell() != 0:
            return None
        if image.fp is None:
            raise ImageError("the PIL image is closed; open it again or pass its path")
        position = image.fp.tell()
        try:
            size = image.fp.seek(0, os.SEEK_END)
            _check_bytes(size, limits)
            image.fp.seek(0)
            data = image.fp.read(size)
        finally:
            image.fp.seek(position)
    again = _open(data, limits)
    return again if (again.size, again.mode) == (image.size, image.mode) else None


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Return a new RGB image without metadata, turned as the EXIF data of `image` says."""
    with _translated(f"convert the image from mode {image.mode} to RGB"):
        rgb = _rgb(image)
        rgb.info = {}
        # The orientation alone: Pillow writes all other EXIF data anew, which can fail.
        rgb.getexif()[ExifTags.Base.Orientation] = _orientation(image.info)
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _orientation(info: dict[str | tuple[int, int], Any]) -> Any:
    holder = Image.new("1", (1, 1))  # the caller's image would keep what is read
    holder.info = dict(info)
    with suppress(*FOREIGN_ERRORS):
        return holder.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _GREY16:
        return _scale_grey16(image)
    keyed = image.mode in ("1", "L", "RGB") and "transparency" in image.info
    if image.mode in _WITH_ALPHA or keyed:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba)
        return white
    if image.mode in _OPAQUE:
        return image.convert("RGB")
    raise ImageError(
        f"an image of PIL mode {image.mode} has no agreed 8-bit RGB form; convert it to RGB, "
        "scaled to 0..255, first"
    )


def _scale_grey16(image: Image.Image) -> Image.Image:
    wide = np.asarray(image)
    if image.mode == "I" and (wide.min() < 0 or wide.max() > 65535):
        raise ImageError(
            "an image of PIL mode I must have values within 0..65535; scale it to 8 bits first"
        )
    grey = ((wide.astype(np.uint32) + 128) // 257).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[wide == key] = 255
    return Image.fromarray(grey).convert("RGB")
