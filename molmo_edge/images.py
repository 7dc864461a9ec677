"""Load any supported input as an upright 8-bit RGB image.

Images are untrusted: bytes and pixels are capped before anything is decoded, only JPEG, PNG, WebP
and BMP are decoded, and nothing is ever fetched. Pillow decodes, in this order of steps:

- Only the first frame counts. Colour profiles and gamma are ignored.
- Transparency (alpha, palette alpha, a transparent colour) is composited on white.
- 16-bit grey is scaled to 8 bits, ``round(value / 257)``; other modes are converted by Pillow.
- The EXIF orientation is applied; malformed EXIF counts as upright.
"""

from __future__ import annotations

import array
import binascii
import io
import itertools
import re
import stat
import struct
import unicodedata
import urllib.parse
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps

from molmo_edge.errors import ImageError, InputError
from molmo_edge.files import expand_home

EncodedBytes: TypeAlias = bytes | bytearray | memoryview | array.array | io.BytesIO  # type: ignore[type-arg]


@runtime_checkable
class Figure(Protocol):
    """A matplotlib figure."""

    def savefig(self, fname: Any, /, *, format: str, bbox_inches: str) -> object: ...


ImageLike: TypeAlias = EncodedBytes | Path | str | Image.Image | npt.NDArray[np.uint8] | Figure

# What Pillow, zlib and the operating system raise over damaged or missing images, as found by
# fuzzing; `Warning` where the application turns warnings into errors.
_FOREIGN_ERRORS: Final[tuple[type[Exception], ...]] = (
    OSError, SyntaxError, TypeError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError, Warning,
)  # fmt: skip

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP")
URL: Final = re.compile(r"\s*([a-z][a-z0-9+.-]*://|data:)", re.IGNORECASE)
_DATA_URL: Final = re.compile(r"\s*data:[^,]{0,200};base64,", re.IGNORECASE)
_BASE64: Final = ("/9j/", "iVBORw0KGgo", "UklGR")  # JPEG, PNG, WebP
# The largest side of a JPEG file; resize filters and buffers grow with a side.
MAX_SIDE_PX: Final = 65_535

# Each scan of a progressive JPEG file costs a pass over the whole image however few bytes it has,
# joining EXIF blocks takes quadratic time, and each segment costs Pillow some Python. Cameras write
# a few dozen. Random bytes, such as a video after the image, hardly ever match the patterns.
MAX_JPEG_SCANS: Final = 100
_JPEG_LIMITS: Final = (
    (re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\x01-\x04]"), MAX_JPEG_SCANS, "scans"),
    (re.compile(rb"Exif\0\0"), 100, "EXIF blocks"),
    (re.compile(rb"\xff[\xc0-\xcf\xda-\xfe]\0"), 10_000, "segments"),
)

_WITH_ALPHA: Final = frozenset({"LA", "P", "PA", "RGBA", "RGBa"})
_OPAQUE: Final = frozenset({"1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})


@dataclass(frozen=True)
class ImageLimits:
    """Caps checked before an image is decoded.

    Attributes:
        max_bytes: of the encoded file; does not apply to arrays and decoded PIL images.
        max_pixels: width x height. Decoding takes 8 to 20 bytes of memory per pixel at its peak.
            Pillow's own limit, ``PIL.Image.MAX_IMAGE_PIXELS``, applies as well, and no side may
            be longer than 65,535.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000


DEFAULT_LIMITS: Final = ImageLimits()


def load(image: ImageLike, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Return a new, upright, 8-bit RGB image.

    Args:
        image: one of

            - a whole JPEG, PNG, WebP or BMP file: ``bytes``, ``bytearray``, ``memoryview``,
              ``array.array``, ``BytesIO``, a uint8 array of shape (n,) as ``cv2.imencode`` returns
              it, or a base64 ``data:`` URL;
            - ``Path`` or ``str``: a path to such a file. No other URL is accepted. Directories,
              pipes and devices are refused without being opened;
            - ``numpy.ndarray``: uint8, shape (height, width, 3), channels in RGB order. OpenCV
              frames are BGR, which cannot be told from RGB: pass ``frame[..., ::-1]``;
            - a matplotlib figure, drawn as it would be saved;
            - ``PIL.Image.Image``: any mode but ``F``, ``LAB`` and ``La``; mode ``I`` only within
              0..65535. One that is not decoded yet must be JPEG (MPO), PNG, WebP or BMP, and is
              decoded in place.
        limits: caps on bytes and pixels.

    Returns:
        An image of mode ``RGB`` with empty ``info`` that shares no memory with `image`. Its
        ``size`` is (width, height) after the EXIF rotation: the size that points refer to.

    Raises:
        ImageError: the image cannot be used; where something else failed, it is the cause.

    The pixels and metadata of the caller's image are left as they are. EXIF is read from ``info``,
    which Pillow keeps through ``rotate`` and ``resize``: after turning an image by hand, delete
    ``info["exif"]``. Pillow may warn about malformed metadata.
    """
    if isinstance(image, Image.Image):
        _check_pil(image, limits)
        return _upright_rgb(image)
    if isinstance(image, Figure):
        with _translated("draw the figure"):
            image.savefig(png := io.BytesIO(), format="png", bbox_inches="tight")
        image = png
    if isinstance(image, np.ndarray) and _encoded_bytes(image) is None:
        return _from_array(image, limits)
    if isinstance(image, str) and len(image) > 100:
        _refuse_base64(image[:16])
    with named(image):
        return _upright_rgb(_open(_read(image, limits), limits))


def open_file(source: object, kind: str, decoded: str, error: type[InputError]) -> BinaryIO:
    """Open the bytes of an encoded file in any form that `load` takes, or a path's regular file.

    For messages: `kind` of file, and what may be passed `decoded`. Raises `error`, OSError and
    ValueError.
    """
    if (data := _encoded_bytes(source)) is not None:
        return io.BytesIO(data)
    if not isinstance(source, (str, Path)):
        kinds = f"a path, the bytes of a file or {decoded}"
        raise error(f"{kind} cannot be of type {type(source).__name__}; pass {kinds}")
    if isinstance(source, str) and (not source or URL.match(source)):
        raise error(
            "a str must be a path or a base64 data: URL, no other URL and not empty: molmo_edge "
            "fetches nothing; download the file and pass its path"
        )
    path = expand_home(source)
    if not stat.S_ISREG(path.stat().st_mode):
        raise error(f"the path names a directory, pipe or device; {kind} is a regular file")
    return path.open("rb")


def _encoded_bytes(source: object) -> bytes | None:
    """Return the bytes of an encoded file, None if `source` is something else."""
    if isinstance(source, str):
        if (start := _DATA_URL.match(source)) is None:
            return None
        return binascii.a2b_base64(urllib.parse.unquote_to_bytes(source[start.end() :]))
    if isinstance(source, np.ndarray) and not (
        source.dtype == np.uint8 and source.ndim < 3 and source.size == max(source.shape, default=0)
    ):
        return None
    if isinstance(source, io.BytesIO):
        return source.getvalue()
    try:
        view = memoryview(source)  # type: ignore[arg-type]
    except TypeError:
        return None
    return None if view.itemsize > 1 else source if isinstance(source, bytes) else bytes(view)


def private_copy(image: ImageLike) -> ImageLike:
    """Return a copy that shares no memory with `image`, nor the file of a path.

    What cannot be copied is returned as it is: `load` says what is wrong with it.
    """
    if isinstance(image, np.ndarray):
        return image.copy()
    with suppress(*_FOREIGN_ERRORS):  # ImageError is a ValueError
        if isinstance(image, Image.Image):
            return _copy_pil(image)
        return _read(image, DEFAULT_LIMITS)
    return image


def _copy_pil(image: Image.Image) -> Image.Image:
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None:
        copy = image.copy()
        copy.format = image.format
        return copy
    position = image.fp.tell()
    image.fp.seek(0)
    lazy = Image.open(io.BytesIO(image.fp.read()), formats=_FORMATS)
    image.fp.seek(position)
    lazy.seek(image.tell())
    lazy.info = dict(image.info)
    return lazy


def image_files(directory: Path) -> list[Path]:
    """Files of a directory with names of images, sorted; hidden ones left out. Raises OSError."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
    )


def printable(path: str | Path) -> str:
    """A path as error messages name it: in quotes, its end if it is long."""
    text = "".join("?" if unicodedata.category(c)[0] == "C" else c for c in str(path))
    return f"'{text if len(text) <= 200 else '…' + text[-200:]}'"


@contextmanager
def named(source: object) -> Iterator[None]:
    """Where `source` is a path, put it before the message of an `InputError`."""
    try:
        yield
    except InputError as exc:
        if isinstance(source, (str, Path)) and not URL.match(str(source)):
            exc.args = (f"{printable(source)}: {exc}",)
        raise


@contextmanager
def _translated(action: str) -> Iterator[None]:
    """Translate errors of Pillow and the operating system into `ImageError`.

    Their messages stay in the cause: they can hold addresses and pieces of the file.
    """
    try:
        yield
    except ImageError:  # which is a ValueError
        raise
    except _FOREIGN_ERRORS as exc:
        bomb = isinstance(exc, Image.DecompressionBombError | Image.DecompressionBombWarning)
        hint = "; it is over Pillow's own limit, PIL.Image.MAX_IMAGE_PIXELS" if bomb else ""
        raise ImageError(
            f"could not {action} ({type(exc).__name__}{hint}); the cause is chained to this error"
        ) from exc


def check_bytes(file: IO[bytes], kind: str, max_bytes: int, error: type[InputError]) -> int:
    """Return the size of an ``"image"`` or ``"video"`` file, which is then read from its start."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size > max_bytes:
        raise error(
            f"the {kind} has more than {max_bytes} bytes, the limit; send a smaller file or raise "
            f"the setting max_{kind}_bytes"
        )
    return size


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"the image is empty: {width} x {height} pixels")
    check_size("the image has", width, height, limits.max_pixels, ImageError)


def check_size(what: str, width: int, height: int, most: int, error: type[InputError]) -> None:
    """Raise `error` for an image, or a video's frames, of too many pixels or too long a side."""
    if width * height > most:
        raise error(
            f"{what} {width} x {height} pixels, the limit is {most} in all; send a smaller one or "
            "raise the setting max_image_pixels"
        )
    if max(width, height) > MAX_SIDE_PX:
        raise error(
            f"{what} {width} x {height} pixels, the limit of a side is {MAX_SIDE_PX}; send a part "
            "of it"
        )


def _check_jpeg(data: bytes) -> None:
    if not data.startswith(b"\xff\xd8"):
        return
    for pattern, limit, name in _JPEG_LIMITS:
        if next(itertools.islice(pattern.finditer(data), limit, None), None):
            raise ImageError(
                f"the JPEG data has more than {limit} {name}, which no camera writes; encode the "
                "image again"
            )


def _refuse_base64(start: str) -> None:
    if start.startswith(_BASE64):
        raise ImageError(
            "this is the text of an encoded image, not its bytes; pass base64.b64decode(text) or a "
            "str 'data:image/…;base64,…'"
        )


def _read(image: ImageLike, limits: ImageLimits) -> bytes:
    decoded = "a PIL image, a matplotlib figure or a uint8 array of shape (height, width, 3)"
    with (
        _translated("read the image file"),
        open_file(image, "an image", decoded, ImageError) as file,
    ):
        return file.read(check_bytes(file, "image", limits.max_bytes, ImageError))


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    """Read the header only."""
    _refuse_base64(data[:16].decode("latin-1"))
    _check_jpeg(data)
    with _translated("read the header of a JPEG, PNG, WebP or BMP image"):
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    _check_size(*image.size, limits)
    return image


def _check_pil(image: Image.Image, limits: ImageLimits) -> None:
    _check_size(*image.size, limits)
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None:
        return  # decoded
    if image.format not in (*_FORMATS, "MPO"):
        raise ImageError(
            f"a PIL image of format {image.format} that was not decoded yet is refused; only JPEG, "
            "PNG, WebP and BMP are decoded here, call its load() first if you trust it"
        )
    with _translated("read the file of the PIL image, which may be closed"):
        position = image.fp.tell()
        check_bytes(image.fp, "image", limits.max_bytes, ImageError)
        _check_jpeg(image.fp.read())
        image.fp.seek(position)


def _from_array(array: npt.NDArray[Any], limits: ImageLimits) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"expected a uint8 array of shape (height, width, 3) in RGB order, got "
            f"{array.dtype.name} of shape {array.shape}; scale it to 0..255, put the channels "
            "last, drop an alpha channel or repeat grey three times"
        )
    height, width = array.shape[:2]
    _check_size(width, height, limits)
    return Image.frombytes("RGB", (width, height), np.ascontiguousarray(array))


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Decode `image` and return it as a new upright RGB image without metadata."""
    with _translated("decode the image, which may be damaged, cut short or closed"):
        image.load()
    with _translated(f"convert the image from mode {image.mode} to RGB"):
        rgb = _rgb(image)
        rgb.info = image.info
        with suppress(*_FOREIGN_ERRORS):  # malformed EXIF
            rgb.getexif()
            rgb.info = {}  # or Pillow would write all EXIF data anew
            ImageOps.exif_transpose(rgb, in_place=True)
        rgb.info = {}
    return rgb


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scale_grey16(image)
    if image.format == "BMP" and image.mode == "RGBA":
        # Many writers of BMP leave the fourth byte zero; such an image would show nothing.
        if image.getchannel("A").getextrema() == (0, 0):
            return image.convert("RGB")
    keyed = image.mode in ("1", "L", "RGB") and "transparency" in image.info
    if image.mode in _WITH_ALPHA or keyed:
        # Converting a palette image writes its alpha into it.
        rgba = (image.copy() if image.mode == "P" else image).convert("RGBA")
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
    if wide.min() < 0 or wide.max() > 65535:
        raise ImageError(
            "an image of PIL mode I must have values within 0..65535; scale it to 8 bits first"
        )
    return Image.fromarray(((wide.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
