"""Decoding a JPEG picture smaller than it is, where no more than that is needed.

libjpeg can leave out the high frequencies of each 8 × 8 block, which gives 1/2, 1/4 or 1/8 of the
picture for less work. This module knows nothing about files, limits or what a picture is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from PIL import Image, ImageFile

Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""

Needed: TypeAlias = Callable[[Size], Size | None]
"""From the size of an upright picture to the size it will be scaled to, None where unknown."""


def choose(picture: ImageFile.ImageFile, needed: Size) -> Size | None:
    """Makes PIL decode the least of 1/2, 1/4 and 1/8 of `picture` that is not below `needed`.

    Args:
        picture: opened, not decoded.
        needed: (width, height) as the rows and columns lie in the file; EXIF is not looked at.

    Returns:
        What `trim` wants behind decoding; None where the whole picture will be decoded, because it
        is no JPEG or half of it would be too small.
    """
    whole = picture.size
    if picture.format != "JPEG" or min(needed) < 1:
        return None
    drafted = picture.draft(None, needed)
    if drafted is None or picture.size == whole:
        return None
    _, (_, _, width, height) = drafted
    return round(width), round(height)


def trim(decoded: Image.Image, size: Size) -> Image.Image:
    """Leaves out a last row or column of which the picture fills less than half.

    PIL keeps it, and scaled as if it were full it would shift everything by up to that pixel.
    """
    return decoded if decoded.size == size else decoded.crop((0, 0, *size))
