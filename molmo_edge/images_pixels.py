"""Decoded pictures of any PIL mode become upright, 8-bit RGB pictures.

This module knows nothing about files, limits or error mapping: what PIL raises passes through.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from PIL import Image

from molmo_edge.errors import ImageError
from molmo_edge.images_formats import orientation

_GREY16: Final = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_WITH_ALPHA: Final = frozenset({"LA", "La", "P", "PA", "RGBA", "RGBa"})
_OPAQUE: Final = frozenset({"1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
_TURN: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(picture: Image.Image, exif: Any) -> Image.Image:
    """A new RGB picture without any metadata, turned as the EXIF block `exif` says.

    Args:
        picture: decoded; left as it is unless its mode is ``P``, whose palette PIL writes to.
        exif: the block as bytes; anything else, or a malformed one, counts as upright.

    Raises:
        ImageError: the mode has no agreed 8-bit RGB form.
    """
    rgb = _rgb(picture)
    turn = _TURN.get(orientation(exif)) if isinstance(exif, bytes) else None
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}
    return rgb


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _GREY16:
        return _scale_grey16(picture)
    keyed = picture.mode in ("1", "L", "RGB") and "transparency" in picture.info
    if picture.mode in _WITH_ALPHA or keyed:
        if picture.mode == "La":
            picture = picture.convert("LA")
        rgba = picture.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba)
        return white
    if picture.mode in _OPAQUE:
        return picture.convert("RGB")
    raise ImageError(
        f"a picture of PIL mode {picture.mode} has no agreed 8-bit RGB form; convert it to RGB, "
        "scaled to 0..255, first"
    )


def _scale_grey16(picture: Image.Image) -> Image.Image:
    wide = np.asarray(picture)
    if picture.mode == "I" and (wide.min() < 0 or wide.max() > 65535):
        raise ImageError(
            "a picture of PIL mode I must have values within 0..65535; scale it to 8 bits first"
        )
    scaled = wide.astype(np.uint32)
    scaled += 128
    scaled //= 257
    grey = scaled.astype(np.uint8)
    key = picture.info.get("transparency")
    if isinstance(key, int):
        grey[wide == key] = 255
    return Image.fromarray(grey).convert("RGB")
