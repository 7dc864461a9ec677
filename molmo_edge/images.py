"""The one door for pictures: whatever the caller has becomes a checked, upright, 8-bit RGB picture.

`load` takes file contents, a path, a PIL image or a NumPy array. Pictures are untrusted: bytes and
pixels are capped before anything is decoded, only JPEG, PNG, WebP and BMP are decoded, every
failure is an `ImageError`, and nothing is ever fetched. This module knows nothing about crops,
tokens or models.

What is done to a picture, in this order:

- Only the first frame counts. ICC profiles, gamma and XMP are ignored, as most model code does.
- Transparency (alpha, palette alpha, a transparent colour) is composited on white.
- 16-bit grey is scaled to 8 bits, ``round(value / 257)``; 16-bit colour keeps its high byte.
- CMYK, YCbCr, HSV and palette are converted to RGB by PIL.
- The EXIF orientation is applied; malformed EXIF counts as upright.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from molmo_edge import images_formats
from molmo_edge.errors import ConfigError, ImageError
from molmo_edge.images_pixels import upright_rgb

ImageLike: TypeAlias = (
    bytes | bytearray | memoryview | Path | str | Image.Image | npt.NDArray[np.uint8]
)

# What PIL, zlib and the operating system raise over damaged, hostile or missing pictures. PIL has
# no base class of its own errors; the tests read its sources and fail when a new kind appears.
FOREIGN_ERRORS: Final[tuple[type[Exception], ...]] = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError,
    LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError, Warning,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

# The classes themselves, not `Image.open`: nothing else can be picked, MPO and its warnings stay
# out, and our pixel cap is the only one in force for them.
_DECODERS: Final[dict[str, type[ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
_LAZY_FORMATS: Final = frozenset(_DECODERS) | {"MPO"}  # an MPO file is a JPEG with more behind it
_URL = re.compile(r"\s*([a-z][a-z0-9+.-]*://|(data|file|https?|ftp):)", re.IGNORECASE)


@dataclass(frozen=True)
class ImageLimits:
    """Caps checked before a picture is decoded.

    Attributes:
        max_bytes: of the encoded file; does not apply to arrays and decoded PIL images.
        max_pixels: width x height. A WebP picture must also stay within twice PIL's own
            ``Image.MAX_IMAGE_PIXELS``, which newer Pillow checks by itself. Decoding and converting
            takes 8 (JPEG, PNG without alpha) to 20 (WebP with alpha) bytes of memory per pixel at
            its peak, measured with Pillow 13.

    Raises:
        ConfigError: a cap is not a positive whole number.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"ImageLimits.{field.name} must be a positive whole number")


DEFAULT_LIMITS: Final = ImageLimits()


def load(image: ImageLike, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Turns anything picture-like into a new, upright, 8-bit RGB picture.

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
        A picture of mode ``RGB`` with empty ``info`` that shares no memory with `image`. Its
        ``size`` is (width, height) after the EXIF rotation: the size that points refer to.

    Raises:
        ImageError: the picture cannot be used; where something else failed, it is the cause.

    The caller's image is left as it is. A PIL image that was not decoded yet is decoded a second
    time from its own file, whose position is put back; so share it between threads only after its
    ``load()``. If it was moved to a later frame or had ``draft()`` called, it is decoded in place,
    which is all that changes. EXIF is read from ``info["exif"]``, which PIL keeps through
    ``rotate`` and ``resize``: after turning a picture by hand, delete that entry.
    """
    if isinstance(image, Image.Image):
        return _from_pil(image, limits)
    if isinstance(image, np.ndarray):
        return _from_array(image, limits)
    if isinstance(image, (bytes, bytearray, memoryview)):
        with _foreign("read the bytes of the picture"):
            _check_bytes(memoryview(image).nbytes, limits)
            data = bytes(image)
        return _decode(*_open(data, limits))
    if isinstance(image, (str, Path)):
        data = _read_file(image, limits)
        return _decode(*_open(data, limits))
    raise ImageError(
        f"a picture cannot be of type {type(image).__name__}; pass the bytes of a file, a path, a "
        "PIL image or a uint8 array of shape (height, width, 3)"
    )


def to_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels of an RGB picture: uint8, shape (height, width, 3), contiguous, writable, a copy.

    Raises:
        ImageError: `image` is not a PIL image of mode ``RGB``; use `load` first.
    """
    if not isinstance(image, Image.Image) or image.mode != "RGB":
        raise ImageError("only a PIL image of mode RGB has an RGB array; pass it to load() first")
    with _foreign("read the pixels of the picture"):
        return np.array(image, dtype=np.uint8, order="C")


@contextmanager
def _foreign(doing: str) -> Iterator[None]:
    """Maps what PIL and the operating system raise to `ImageError`.

    Their messages stay in the cause: they can hold addresses, file names and pieces of the file.
    """
    try:
        yield
    except ImageError:
        raise
    except MemoryError as exc:
        raise ImageError(f"not enough memory to {doing}; use a smaller picture") from exc
    except Image.DecompressionBombError as exc:
        raise ImageError(
            "the WebP picture has more than twice PIL's Image.MAX_IMAGE_PIXELS; send a smaller one"
        ) from exc
    except FOREIGN_ERRORS as exc:
        raise ImageError(
            f"could not {doing} ({type(exc).__name__}); the cause is chained to this error"
        ) from exc


def _check_bytes(size: int, limits: ImageLimits) -> None:
    if size > limits.max_bytes:
        raise ImageError(
            f"the picture has more than {limits.max_bytes} bytes, the limit; send a smaller file "
            "or raise ImageLimits.max_bytes"
        )


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"the picture is empty: {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"the picture has {width} x {height} pixels, the limit is {limits.max_pixels} in all; "
            "send a smaller one or raise ImageLimits.max_pixels"
        )


def _read_file(path: str | Path, limits: ImageLimits) -> bytes:
    if isinstance(path, str) and (not path or _URL.match(path)):
        raise ImageError(
            "a str must be the path of a picture file, not a URL and not empty: molmo_edge fetches "
            "nothing; download the picture and pass its bytes"
        )
    with _foreign("read the picture file"):
        name = os.fspath(path)
        _check_regular(Path(name).stat().st_mode)  # opening a device can already have effects
        # A pipe put there since then neither blocks this open nor passes the second look.
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            info = os.fstat(file.fileno())
            _check_regular(info.st_mode)
            _check_bytes(info.st_size, limits)
            return file.read(info.st_size)


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ImageError("the path names a directory, pipe or device; a picture is a regular file")


def _open(data: bytes, limits: ImageLimits) -> tuple[ImageFile.ImageFile, bytes | None]:
    """Reads the header only; the picture is within the limits and not decoded."""
    _check_bytes(len(data), limits)
    with _foreign("read the header of the picture"):
        file_format, data, exif = images_formats.clean(data)
        if file_format == "WEBP" and not WebPImagePlugin.SUPPORTED:
            raise ImageError("this build of Pillow reads no WebP; convert the picture to PNG")
        picture = _DECODERS[file_format](io.BytesIO(data))
    _check_size(picture.size, limits)
    return picture, exif


def _decode(picture: ImageFile.ImageFile, exif: bytes | None) -> Image.Image:
    with _foreign(f"decode the {picture.format} data, which is damaged or cut short"):
        picture.load()
        if picture.format == "BMP" and picture.mode == "RGBA":
            # Many writers leave the fourth byte zero; none means a picture that shows nothing.
            if picture.getchannel("A").getextrema() == (0, 0):
                picture.putalpha(255)
    return _convert(picture, exif or picture.info.get("exif"))


def _convert(picture: Image.Image, exif: Any) -> Image.Image:
    with _foreign(f"convert the picture from mode {picture.mode} to RGB"):
        return upright_rgb(picture, exif)


def _from_array(array: npt.NDArray[Any], limits: ImageLimits) -> Image.Image:
    if isinstance(array, np.ma.MaskedArray):
        raise ImageError("a masked array has no agreed colour under its mask; fill it first")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"expected a uint8 array of shape (height, width, 3) in RGB order, got "
            f"{array.dtype.name} of shape {array.shape}; nothing is guessed, so scale it to 0..255,"
            " put the channels last, drop an alpha channel or repeat grey three times"
        )
    height, width = array.shape[:2]
    _check_size((width, height), limits)
    with _foreign("copy the array"):
        return Image.frombytes("RGB", (width, height), np.ascontiguousarray(array))


def _from_pil(image: Image.Image, limits: ImageLimits) -> Image.Image:
    _check_size(image.size, limits)
    if isinstance(image, ImageFile.ImageFile) and _is_lazy(image):
        if image.format not in _LAZY_FORMATS:
            raise ImageError(
                f"a PIL image of format {image.format} that was not decoded yet is refused; only "
                "JPEG, PNG, WebP and BMP are decoded here, call its load() first if you trust it"
            )
        again = _reopen(image, limits)
        if again is not None:
            return _decode(*again)
    with _foreign("read the PIL image, which may be closed or damaged"):
        image.load()
        # Converting a palette picture writes its alpha into it.
        ours = image.copy() if image.mode == "P" else image
    return _convert(ours, image.info.get("exif"))


def _is_lazy(image: ImageFile.ImageFile) -> bool:
    # WebP has no tile before it is decoded, but no pixel memory either.
    return bool(image.tile) or getattr(image, "_im", image) is None


def _reopen(
    image: ImageFile.ImageFile, limits: ImageLimits
) -> tuple[ImageFile.ImageFile, bytes | None] | None:
    """A second view of the file of a lazy `image`; None where it would show something else."""
    with _foreign("read the file of the PIL image, which may be closed"):
        if image.tell() != 0:
            return None
        if image.fp is None:
            raise ImageError("the PIL image is closed; open it again or pass its path")
        position = image.fp.tell()
        try:
            image.fp.seek(0, os.SEEK_END)
            size = image.fp.tell()
            _check_bytes(size, limits)
            image.fp.seek(0)
            data = image.fp.read(size)
        finally:
            image.fp.seek(position)
    opened = _open(data, limits)
    same = (opened[0].size, opened[0].mode) == (image.size, image.mode)
    return opened if same else None
