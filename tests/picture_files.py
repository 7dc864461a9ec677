"""The crafted picture files of the tests, and short ways to look at pictures."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from molmo_edge.images import to_array
from tests.data.images import make

DATA = Path(__file__).parent / "data" / "images"
ACCEPTED, REFUSED = DATA / "accepted", DATA / "refused"
WHITE = (255, 255, 255)


def files(folder: Path) -> list[Any]:
    return [pytest.param(path, id=path.name) for path in sorted(folder.iterdir())]


def pixels(picture: Image.Image) -> list[Any]:
    return [tuple(pixel) for row in to_array(picture).tolist() for pixel in row]


def png(**options: Any) -> bytes:
    return make.encode(make.corners(), "PNG", **options)


def opened(path: Path) -> Any:
    """The file opened by PIL, not decoded; what PIL warns about it is not our matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(path.read_bytes()))
