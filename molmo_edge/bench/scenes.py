"""Drawn scenes whose content is known: coloured shapes that do not overlap, on a background.

The demo model is trained on such scenes, and `accuracy` asks any model about others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

KINDS = ("circle", "square", "triangle", "star")
COLORS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 20, 30), (200, 40, 40)),
    "orange": ((255, 165, 0), (255, 127, 14), (245, 130, 30)),
    "yellow": ((255, 255, 0), (250, 220, 30), (255, 215, 0)),
    "green": ((0, 128, 0), (0, 200, 0), (44, 160, 44), (0, 255, 0)),
    "blue": ((0, 0, 255), (31, 119, 180), (40, 80, 200)),
    "purple": ((128, 0, 128), (150, 50, 200), (110, 40, 160)),
    "black": ((0, 0, 0), (25, 25, 25)),
    "white": ((255, 255, 255), (240, 240, 240)),
}
"""Names, and typical values that drawings have."""
MOST = 8
"""Shapes of a scene."""
# Of a shape's colour from the background's, the sum over red, green and blue.
_CONTRAST = 150
_ASPECTS = ((1, 1), (1, 1), (4, 3), (3, 2), (16, 9), (3, 4))


@dataclass(frozen=True)
class Shape:
    """One shape; its centre as fractions of the scene's width and height, from the top left.

    Attributes:
        radius: of the circle around it, a fraction of the scene's shorter side.
        angle: radians.
        rgb: the colour it is drawn in, one of its name's and a little off.
    """

    kind: str
    color: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: RGB

    def outline(self, size: tuple[int, int]) -> list[tuple[float, float]]:
        """Its corners in pixels of a scene of (width, height), 40 of a circle."""
        # Corners, and the radius of every second one.
        corners, inner = {"circle": (40, 1.0), "square": (4, 1.0), "triangle": (3, 1.0)}.get(
            self.kind, (10, 0.45)
        )
        radius = self.radius * min(size)
        turn = self.angle - (math.pi / 4 if self.kind == "square" else math.pi / 2)
        return [
            (
                self.x * size[0] + length * math.cos(turn + 2 * math.pi * i / corners),
                self.y * size[1] + length * math.sin(turn + 2 * math.pi * i / corners),
            )
            for i in range(corners)
            for length in [radius * (inner if i % 2 else 1.0)]
        ]


@dataclass(frozen=True)
class Scene:
    """An image to be drawn.

    Attributes:
        size: (width, height) in pixels.
        background: the colours at its top left and bottom right; equal ones for a plain one.
        noise: amplitude, of 255, of what is added to every value.
        seed: of the noise.
    """

    shapes: tuple[Shape, ...]
    size: tuple[int, int] = (320, 240)
    background: tuple[RGB, RGB] = ((255, 255, 255), (255, 255, 255))
    noise: int = 0
    seed: int = 0

    def select(self, kind: str | None = None, color: str | None = None) -> tuple[Shape, ...]:
        """The shapes of a kind and a colour, None for any, from left to right."""
        found = [s for s in self.shapes if kind in (None, s.kind) and color in (None, s.color)]
        return tuple(sorted(found, key=lambda shape: (shape.x, shape.y)))

    def draw(self) -> Image.Image:
        """The image in RGB."""
        width, height = self.size
        first, last = (np.array(rgb, np.float32) for rgb in self.background)
        if self.background[0] == self.background[1]:
            image = Image.new("RGB", self.size, self.background[0])
        else:
            way = np.add.outer(np.linspace(0, 0.5, height), np.linspace(0, 0.5, width))
            image = Image.fromarray((first + way[..., None] * (last - first)).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        for shape in self.shapes:
            pen.polygon(shape.outline(self.size), fill=shape.rgb)
        if not self.noise:
            return image
        span = 2 * self.noise + 1
        noise = np.random.default_rng(self.seed).integers(0, span, (height, width, 3), np.int16)
        return Image.fromarray(
            (np.asarray(image) + noise - self.noise).clip(0, 255).astype(np.uint8)
        )


def random_scene(
    rng: np.random.Generator, count: int | None = None, longest: tuple[int, int] = (224, 640)
) -> Scene:
    """A scene of `count` shapes, 0 to 8; None for any number.

    Args:
        longest: range of the longer side, pixels.
    """
    aspect = _ASPECTS[rng.integers(len(_ASPECTS))]
    side = int(rng.integers(*longest, endpoint=True))
    size = (side * aspect[0] // max(aspect), side * aspect[1] // max(aspect))
    background = _background(rng)
    count = int(rng.integers(0, MOST + 1)) if count is None else count
    shapes: list[Shape] = []
    # Scenes of few kinds and colours have more alike.
    kinds = rng.permutation(KINDS)[: rng.integers(1, len(KINDS) + 1)]
    colors = [name for name in rng.permutation(list(COLORS)) if _stands_out(name, background)]
    colors = colors[: rng.integers(1, len(colors) + 1)]
    largest = 0.2 if count <= 3 else 0.15
    for _ in range(400):
        if len(shapes) == count:
            break
        shape = _random_shape(rng, str(rng.choice(kinds)), str(rng.choice(colors)), largest, size)
        if all(_apart(shape, other, size) for other in shapes):
            shapes.append(shape)
    noise = int(rng.integers(5, 40)) if rng.random() < 0.3 else 0
    return Scene(tuple(shapes), size, background, noise, int(rng.integers(2**31)))


def random_clip(rng: np.random.Generator, times: Sequence[float]) -> list[Scene]:
    """The same scene at each time, in which the first shape moves straight on."""
    scene = random_scene(rng, count=int(rng.integers(1, 4)))
    mover = scene.shapes[0]
    # No other is like it, so that words tell which one moves.
    others = [s for s in scene.shapes[1:] if (s.kind, s.color) != (mover.kind, mover.color)]
    for _ in range(200):
        goal = _random_shape(rng, mover.kind, mover.color, mover.radius, scene.size)
        ways = np.linspace(0, 1, len(times)) if times[-1] == 0 else np.divide(times, times[-1])
        path = [
            replace(
                mover,
                x=float(mover.x + way * (goal.x - mover.x)),
                y=float(mover.y + way * (goal.y - mover.y)),
            )
            for way in ways
        ]
        far = math.hypot(goal.x - mover.x, goal.y - mover.y) > 0.3
        if far and all(_apart(at, other, scene.size) for at in path for other in others):
            break
    else:
        others = []
    return [replace(scene, shapes=(at, *others), seed=scene.seed + i) for i, at in enumerate(path)]


def _background(rng: np.random.Generator) -> tuple[RGB, RGB]:
    def color() -> RGB:
        if rng.random() < 0.6:  # most drawings are on white, or nearly grey
            level = 255 if rng.random() < 0.4 else int(rng.integers(0, 256))
            tint = rng.integers(-12, 13, 3)
            return _rgb(level + tint if level < 255 else [255] * 3)
        return _rgb(rng.integers(0, 256, 3))

    first = color()
    return first, color() if rng.random() < 0.3 else first


def _rgb(values: Sequence[int] | npt.NDArray[np.integer[Any]]) -> RGB:
    red, green, blue = (int(min(max(value, 0), 255)) for value in values)
    return red, green, blue


def _stands_out(name: str, background: tuple[RGB, RGB]) -> bool:
    first, last = (np.array(rgb) for rgb in background)
    middle = (first + last) // 2
    return all(
        np.abs(np.array(rgb) - there).sum() >= _CONTRAST
        for rgb in COLORS[name]
        for there in (first, middle, last)
    )


def _random_shape(
    rng: np.random.Generator, kind: str, color: str, largest: float, size: tuple[int, int]
) -> Shape:
    radius = float(rng.uniform(min(0.07, largest), largest))
    # Whole shapes: none is cut by an edge.
    margin = [1.1 * radius * min(size) / side for side in size]
    x, y = (float(rng.uniform(m, 1 - m)) for m in margin)
    typical = COLORS[color]
    jitter = rng.integers(-12, 13, 3)
    rgb = _rgb(np.array(typical[rng.integers(len(typical))]) + jitter)
    angle = float(rng.uniform(-0.35, 0.35)) if rng.random() < 0.6 else 0.0
    return Shape(kind, color, x, y, radius, angle, rgb)


def _apart(one: Shape, other: Shape, size: tuple[int, int]) -> bool:
    distance = math.hypot((one.x - other.x) * size[0], (one.y - other.y) * size[1])
    return distance > 1.1 * (one.radius + other.radius) * min(size)
