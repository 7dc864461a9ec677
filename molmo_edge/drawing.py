"""Numbered markers on a copy of a picture.

A marker is a coloured dot with a white and a black ring, a number stands white on black: both show
on any background. Sizes follow the picture's and shrink when there are many points. A number never
covers a dot or another number; one that has to stand apart is tied to its dot by a line, and both
have the same colour. This module knows nothing about where the points come from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

from PIL import Image, ImageDraw, ImageFont, features

from molmo_edge.images import DEFAULT_LIMITS, ImageLike, ImageLimits, load

# Neighbours in the list differ strongly, so that neighbouring numbers can be told apart.
_COLOURS = (
    (255, 0, 110),
    (0, 220, 60),
    (60, 130, 255),
    (255, 190, 0),
    (190, 60, 255),
    (0, 215, 225),
    (255, 95, 30),
    (170, 225, 20),
)
_WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)
_FINE = 4  # shapes are drawn this much larger and scaled down, for smooth edges
_CROWD = 8  # boxes a cell of the grid remembers; a fuller one counts as taken
_RINGS = 10  # distances at which a place for a number is sought
_PATIENCE = 60_000  # places tried in all, so that thousands of points take seconds, not minutes

_Colour = tuple[int, int, int]
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
        An upright RGB picture without metadata. A number without a free place near its dot is
        left out: where hundreds crowd together, or in a picture of less than 34 x 34 pixels.

    Raises:
        ImageError: the picture cannot be used.
    """
    canvas = load(image, limits)
    width, height = canvas.size
    spots = [
        (str(number), min(int(x * width), width - 1), min(int(y * height), height - 1))
        for number, x, y in marks
    ]
    font_size, line = _sizes(len(spots), width, height)
    badges = _Badges(font_size, line)
    dots = [_dot(max(2, round(font_size * 0.25)), (line + 1) // 2, colour) for colour in _COLOURS]
    half = dots[0].width // 2
    placed = _place(spots, badges, canvas.size, half + 1 + line)
    draw = ImageDraw.Draw(canvas)
    for index, (left, top, right, bottom) in placed.items():
        leader = [((left + right) // 2, (top + bottom) // 2), spots[index][1:]]
        draw.line(leader, _BLACK, 3 * line)
        draw.line(leader, _COLOURS[index % len(_COLOURS)], line)
    for index, (_, column, row) in enumerate(spots):
        dot = dots[index % len(dots)]
        canvas.paste(dot, (column - half, row - half), dot)
    for index, box in placed.items():
        badge = badges.draw(spots[index][0], _COLOURS[index % len(_COLOURS)])
        canvas.paste(badge, box[:2])
    return canvas


def _sizes(count: int, width: int, height: int) -> tuple[int, int]:
    """The size of the font and the width of a line, in pixels."""
    area = width * height
    usual = 0.028 * min(math.sqrt(area), 2 * min(width, height))
    # The numbers may cover a seventh of the picture; one is about this many font sizes wide.
    wide = 0.6 * (len(str(count)) + 1)
    font_size = max(10, min(usual, math.sqrt(area / 7 / max(1, count) / wide)))
    return round(font_size), max(1, round(font_size * 0.1))


def _dot(radius: int, ring: int, colour: _Colour) -> Image.Image:
    side = 2 * (radius + 2 * ring) + 1
    fine = Image.new("RGBA", (side * _FINE, side * _FINE), (*_BLACK, 0))
    draw = ImageDraw.Draw(fine)
    for inset, fill in ((0, _BLACK), (ring, _WHITE), (2 * ring, colour)):
        edge = inset * _FINE
        draw.ellipse((edge, edge, side * _FINE - 1 - edge, side * _FINE - 1 - edge), fill)
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

    def draw(self, number: str, colour: _Colour) -> Image.Image:
        """White on black with a coloured rim inside a black one, RGB."""
        width, height = self.size(number)
        badge = Image.new("RGB", (width, height), _BLACK)
        draw = ImageDraw.Draw(badge)
        rim = self._line // 2
        draw.rectangle((rim, rim, width - 1 - rim, height - 1 - rim), None, colour, self._line)
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
) -> dict[int, _Box]:
    """Boxes for the numbers of the spots, by index; ``clear`` pixels round every dot stay free."""
    longest = max((len(number) for number, _, _ in spots), default=1)
    taken = _Taken(badges.size("0" * longest)[0])
    for _, column, row in spots:
        taken.add((column - clear + 1, row - clear + 1, column + clear, row + clear))
    placed: dict[int, _Box] = {}
    patience = _PATIENCE
    for index, spot in enumerate(spots):
        width, height = badges.size(spot[0])
        if width > size[0] or height > size[1]:
            continue
        for left, top in _around(spot, (width, height), clear):
            left = min(max(left, 0), size[0] - width)
            top = min(max(top, 0), size[1] - height)
            box = (left, top, left + width, top + height)
            patience -= 1
            if taken.free(box):
                taken.add(box)
                placed[index] = box
                break
            if patience < 0:
                break
    return placed


def _around(spot: _Spot, size: tuple[int, int], clear: int) -> Iterator[tuple[int, int]]:
    """Places for a box beside a spot, the nearest first, beginning at its upper right."""
    _, column, row = spot
    width, height = size
    for ring in range(_RINGS):
        for step in range(8 * (ring + 1)):
            angle = math.pi / 4 * (step / (ring + 1) - 1)
            across, down = math.cos(angle), math.sin(angle)
            reach = 1 / max(abs(across), abs(down))
            yield (
                column + round(across * reach * (clear + width * (ring + 0.5)) - width / 2),
                row + round(down * reach * (clear + height * (ring + 0.5)) - height / 2),
            )
