from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo_edge.engine.fake import FakeEngine, FakeFactory


def encoded(number: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A PNG file of one colour, another one for each number."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory of images, some of them broken."""

    def make(count: int, broken: tuple[int, ...] = (), name: str = "photos") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for number in range(count):
            data = b"no image" if number in broken else encoded(number)
            (directory / f"{number:04}.png").write_bytes(data)
        return directory

    return make


def shown(turns: object) -> str:
    """An answer that says which image was seen."""
    turn = turns[-1]  # type: ignore[index]
    if not turn.images:
        return "nothing"
    red, green, _ = np.asarray(turn.images[0])[0, 0]
    number = int(red) + 256 * int(green)
    if turn.text.startswith("Point"):
        return f'<point x="50.0" y="25.0" alt="mug">{number}</point>'
    return f"There are {number}." if turn.text.startswith("How many") else f"image {number}"


@pytest.fixture
def fake() -> FakeFactory:
    return FakeEngine.factory(shown)
