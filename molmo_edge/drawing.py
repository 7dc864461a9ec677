"""Numbered markers on a copy of a picture.

A marker is a dot with a white and a black ring, a number is white on black with a white rim: both
stand out from any background. Sizes follow the picture's; numbers keep clear of dots and of each
other as far as there is room, with a line to a dot they had to leave. This module knows nothing
about where the points come from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

from PIL import Image, ImageDraw, ImageFont, features

from molmo_edge.images import DEFAULT_LIMITS, ImageLike, ImageLimits, load

_DOT = (255, 0, 110)
_WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)
_FINE = 4  # shapes are drawn this much larger and scaled down, for smooth edges
_CROWD = 8  # boxes a cell of the grid remembers; a fuller one counts as taken
_RINGS = 10  # distances at which a place for a number is sought
_PATIENCE = 120_000  # places tried in all, so that thousands of points take seconds, not minutes

_Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are outside
_Spot = tuple[str, int, int]  # number, column, row


def draw_marks(
    image: ImageLike,
    marks: Iterable[tuple[int, float, float]],
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Image.Image:
    """A new picture with the marks on it.

    Args:
        image: anything ``molmo_edge.images.load`` takes; left as it is.
        marks: (number, x, y), x and y from 0 to 1 from the top-left corner of the upright picture.
        limits: caps on the picture's bytes and pixels.

    Returns:
        An upright RGB picture without metadata. A picture too small for a number (about 20 pixels
        a side) gets dots only.

    Raises:
        ImageError: the picture cannot be used.
    """
    canvas = load(image, limits)
    width, height = canvas.size
    spots = [
        (str(number), min(int(x * width), width - 1), min(int(y * height), height - 1))
        for number, x, y in marks
    ]
    scale = min(math.sqrt(width * height), 2 * min(width, height))
    line = max(1, round(scale * 0.0022))
    dot = _dot(max(2, round(scale * 0.008)), line)
    badges = _Badges(max(10, round(scale * 0.028)), line)
    draw = ImageDraw.Draw(canvas)
    placed = list(_place(spots, badges, canvas.size, dot.width // 2 + 1 + line))
    for (_, column, row), (left, top, right, bottom) in placed:
        leader = [((left + right) // 2, (top + bottom) // 2), (column, row)]
        draw.line(leader, _BLACK, 3 * line)
        draw.line(leader, _WHITE, line)
    for _, column, row in spots:
        canvas.paste(dot, (column - dot.width // 2, row - dot.height // 2), dot)
    for (number, _, _), (left, top, _, _) in placed:
        canvas.paste(badges.draw(number), (left, top))
    return canvas


def _dot(radius: int, ring: int) -> Image.Image:
    side = 2 * (radius + 2 * ring) + 1
    fine = Image.new("RGBA", (side * _FINE, side * _FINE), (*_BLACK, 0))
    draw = ImageDraw.Draw(fine)
    for inset, colour in ((0, _BLACK), (ring, _WHITE), (2 * ring, _DOT)):
        edge = inset * _FINE
        draw.ellipse((edge, edge, side * _FINE - 1 - edge, side * _FINE - 1 - edge), colour)
    return fine.resize((side, side), Image.Resampling.BOX)


class _Badges:
    """Numbers as small pictures of one height, at a font size in pixels."""

    def __init__(self, font_size: int, line: int) -> None:
        # Pillow builds without FreeType have one bitmap font of one size.
        self._font = ImageFont.load_default(font_size if features.check("freetype2") else None)
        self._line = line
        _, top, _, bottom = self._font.getbbox("0123456789")
        self._top, self._tall = top, math.ceil(bottom - top)
        self._pad = line + max(1, round(self._tall * 0.2))

    def size(self, number: str) -> tuple[int, int]:
        """(width, height) in pixels."""
        left, _, right, _ = self._font.getbbox(number)
        return math.ceil(right - left) + 2 * self._pad, self._tall + 2 * self._pad

    def draw(self, number: str) -> Image.Image:
        """White on black with a white rim, RGB."""
        width, height = self.size(number)
        badge = Image.new("RGB", (width, height), _BLACK)
        draw = ImageDraw.Draw(badge)
        draw.rectangle((0, 0, width - 1, height - 1), outline=_WHITE, width=self._line)
        left = self._font.getbbox(number)[0]
        draw.text((self._pad - left, self._pad - self._top), number, _WHITE, self._font)
        return badge


class _Taken:
    """Boxes on a grid, so that asking for a free place costs the same however many there are."""

    def __init__(self, cell: int) -> None:
        self._cell = cell
        self._cells: dict[tuple[int, int], list[_Box]] = defaultdict(list)

    def add(self, box: _Box) -> None:
        for cell in self._touched(box):
            if len(self._cells[cell]) < _CROWD:
                self._cells[cell].append(box)

    def free(self, box: _Box) -> bool:
        left, top, right, bottom = box
        return not any(
            len(boxes) == _CROWD
            or any(a < right and left < c and b < bottom and top < d for a, b, c, d in boxes)
            for boxes in map(self._cells.__getitem__, self._touched(box))
        )

    def _touched(self, box: _Box) -> Iterator[tuple[int, int]]:
        left, top, right, bottom = (side // self._cell for side in box)
        return ((x, y) for x in range(left, right + 1) for y in range(top, bottom + 1))


def _place(
    spots: list[_Spot], badges: _Badges, size: tuple[int, int], clear: int
) -> Iterator[tuple[_Spot, _Box]]:
    """A box for the number of every spot, ``clear`` pixels from its dot's centre or more."""
    if not spots:
        return
    taken = _Taken(max(map(len, (s[0] for s in spots))) * badges.size("0")[1])
    for _, column, row in spots:
        taken.add((column - clear + 1, row - clear + 1, column + clear, row + clear))
    patience = _PATIENCE
    for spot in spots:
        fallback = None
        for box in _around(spot, badges.size(spot[0]), clear):
            if box[0] < 0 or box[1] < 0 or box[2] > size[0] or box[3] > size[1]:
                continue
            fallback = fallback or box
            patience -= 1
            if taken.free(box):
                fallback = box
                break
            if patience < 0:
                break
        if fallback:
            taken.add(fallback)
            yield spot, fallback


def _around(spot: _Spot, size: tuple[int, int], clear: int) -> Iterator[_Box]:
    """Places for a number beside a spot, the nearest first, beginning at its upper right."""
    _, column, row = spot
    width, height = size
    for ring in range(_RINGS):
        for step in range(8 * (ring + 1)):
            angle = math.pi / 4 * (step / (ring + 1) - 1)
            across, down = math.cos(angle), math.sin(angle)
            reach = 1 / max(abs(across), abs(down))
            left = column + round(across * reach * (clear + width * (ring + 0.5)) - width / 2)
            top = row + round(down * reach * (clear + height * (ring + 0.5)) - height / 2)
            yield left, top, left + width, top + height
