"""Draws the three pictures of the standard benchmark, the same bytes' worth every time.

    python benchmarks/make_cases.py [FOLDER]

They stand in for the 2025 report's three photographs and plots, which were never published: a
boardwalk through a marsh (dense caption), a four-panel plot, and a line chart whose values can be
read off. Random texture comes from one seeded generator; nothing is downloaded.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = (1024, 768)
ZOOM = 2  # drawn larger and scaled down, which is Pillow's way to smooth edges
DATA = Path(__file__).resolve().parent.parent / "molmo_edge" / "bench" / "data"

YEARS = (2018, 2019, 2020, 2021, 2022, 2023, 2024)
SOLAR = (10, 15, 25, 40, 55, 70, 85)
WIND = (45, 50, 40, 60, 65, 50, 75)

Colour = tuple[int, int, int]
BLUE, ORANGE, GREEN, RED = (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)
INK, GRID, PAPER = (38, 38, 38), (214, 214, 214), (255, 255, 255)


def main() -> None:
    """Write the three pictures into FOLDER, by default the package's own data folder."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    folder.mkdir(parents=True, exist_ok=True)
    shrink(boardwalk()).save(folder / "boardwalk.jpg", quality=84, optimize=True)
    for name, picture in (("panels", panels()), ("linechart", line_chart())):
        small = shrink(picture).quantize(128, dither=Image.Dither.NONE)
        small.save(folder / f"{name}.png", optimize=True)


def shrink(picture: Image.Image) -> Image.Image:
    return picture.resize(SIZE, Image.Resampling.LANCZOS)


def blend(a: Colour, b: Colour, share: float) -> Colour:
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


# The boardwalk -----------------------------------------------------------------------------


def boardwalk() -> Image.Image:
    """A wooden boardwalk vanishing into a green marsh, trees behind it, clouds above."""
    rng = random.Random(20251208)
    width, height = SIZE[0] * ZOOM, SIZE[1] * ZOOM
    horizon = round(height * 0.44)
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    for y in range(horizon):
        draw.line((0, y, width, y), blend((58, 118, 190), (196, 220, 238), y / horizon))
    picture.paste(*_clouds(rng, width, horizon))
    for y in range(horizon, height):
        near = (y - horizon) / (height - horizon)
        draw.line((0, y, width, y), blend((126, 150, 70), (58, 104, 34), near))
    _trees(rng, draw, width, horizon)
    _grass(rng, draw, width, height, horizon)
    _planks(rng, draw, width, height, horizon)
    _grass(rng, draw, width, height, horizon, beside_path=True)
    return picture.filter(ImageFilter.GaussianBlur(0.8))


def _clouds(rng: random.Random, width: int, horizon: int) -> tuple[Image.Image, None, Image.Image]:
    mask = Image.new("L", (width, horizon), 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(9):
        x, y = rng.uniform(0, width), rng.uniform(horizon * 0.08, horizon * 0.6)
        for _ in range(26):
            w, h = rng.uniform(50, 190), rng.uniform(14, 46)
            cx, cy = x + rng.gauss(0, 150), y + rng.gauss(0, 20)
            draw.ellipse((cx - w, cy - h, cx + w, cy + h), fill=rng.randint(90, 215))
    mask = mask.filter(ImageFilter.GaussianBlur(22))
    return Image.new("RGB", (width, horizon), (250, 251, 253)), None, mask


def _trees(rng: random.Random, draw: ImageDraw.ImageDraw, width: int, horizon: int) -> None:
    x = -40.0
    while x < width + 40:
        # Lower towards the middle, where the path vanishes.
        tall = 40 + 170 * abs(x / width - 0.5) ** 0.7 * rng.uniform(0.6, 1.25)
        base = horizon + rng.uniform(0, 16)
        shade = blend((28, 62, 30), (84, 118, 52), rng.random())
        if rng.random() < 0.3:
            for step in range(9):
                y, half = base - tall * 1.15 * step / 9, tall * 0.28 * (1 - step / 9)
                draw.polygon(
                    [(x - half, y), (x + half, y), (x, y - tall * 0.3)],
                    fill=blend(shade, (20, 50, 26), 0.4),
                )
        else:
            for _ in range(22):
                cx, cy = x + rng.gauss(0, tall * 0.22), base - tall * rng.uniform(0.05, 0.95)
                r = tall * rng.uniform(0.08, 0.2)
                leaf = blend(shade, (150, 170, 80), rng.random() * 0.35)
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=leaf)
        x += rng.uniform(14, 44)


def _path_half(near: float) -> float:
    """Half the path's width in pixels; ``near`` is 0 at the horizon and 1 at the lower edge."""
    return 8 + 560 * math.pow(near, 1.15)


def _path_middle(near: float, width: int) -> float:
    return width * (0.52 - 0.03 * math.sin(near * 2.2))


def _grass(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    width: int,
    height: int,
    horizon: int,
    *,
    beside_path: bool = False,
) -> None:
    blades = []
    for _ in range(900 if beside_path else 12_000):
        near = rng.random() ** 0.75
        half, middle = _path_half(near), _path_middle(near, width)
        if beside_path:
            side = rng.choice((-1, 1))
            x = middle + side * half * rng.uniform(1.0, 1.12)
        else:
            x = rng.uniform(0, width)
            if abs(x - middle) < half * 1.02:
                continue
        blades.append((near, x))
    for near, x in sorted(blades):
        y = horizon + near * (height - horizon)
        tall = (7 + 105 * near) * rng.uniform(0.6, 1.15)
        lean = tall * rng.gauss(0.05, 0.22)
        fresh = blend((196, 196, 96), (112, 168, 52), near)
        colour = blend(fresh, (36, 84, 26), rng.random())
        points = [(x, y), (x + lean * 0.35, y - tall * 0.6), (x + lean, y - tall)]
        draw.line(points, fill=colour, width=max(1, round(1 + 4 * near)))


def _planks(
    rng: random.Random, draw: ImageDraw.ImageDraw, width: int, height: int, horizon: int
) -> None:
    edges = [0.0]
    while edges[-1] < 1:
        edges.append(min(1.0, edges[-1] * 1.052 + 0.0035))
    for far, near in itertools.pairwise(edges):
        top, bottom = (horizon + share * (height - horizon) for share in (far, near))
        corners = [
            (_path_middle(far, width) - _path_half(far), top),
            (_path_middle(far, width) + _path_half(far), top),
            (_path_middle(near, width) + _path_half(near), bottom),
            (_path_middle(near, width) - _path_half(near), bottom),
        ]
        wood = blend((150, 132, 106), (186, 168, 140), rng.random())
        draw.polygon(corners, fill=blend((168, 164, 146), wood, 0.35 + 0.65 * far))
        for _ in range(round(16 * near)):
            y = rng.uniform(top, bottom)
            x0 = rng.uniform(corners[3][0], corners[2][0] - 40)
            draw.line(
                (x0, y, x0 + rng.uniform(30, 260) * near, y), fill=blend(wood, (92, 76, 58), 0.45)
            )
        gap = max(1, round(7 * near))
        draw.line((corners[3], corners[2]), fill=(66, 54, 42), width=gap)


# Charts ------------------------------------------------------------------------------------


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * ZOOM)


class Axes:
    """A rectangle of the picture with data coordinates, in the plain style of matplotlib."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        box: tuple[float, float, float, float],
        x: tuple[float, float],
        y: tuple[float, float],
    ) -> None:
        self.draw = draw
        self.left, self.top, self.right, self.bottom = (edge * ZOOM for edge in box)
        self.x, self.y = x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )

    def frame(
        self,
        title: str,
        xticks: list[tuple[float, str]],
        yticks: list[tuple[float, str]],
        *,
        size: int = 13,
        xlabel: str = "",
        grid: bool = True,
    ) -> None:
        for value, text in xticks:
            x, _ = self.at(value, self.y[0])
            if grid:
                self.draw.line((x, self.top, x, self.bottom), fill=GRID, width=ZOOM)
            self.draw.line((x, self.bottom, x, self.bottom + 5 * ZOOM), fill=INK, width=ZOOM)
            self.draw.text((x, self.bottom + 8 * ZOOM), text, INK, font(size), anchor="mt")
        for value, text in yticks:
            _, y = self.at(self.x[0], value)
            if grid:
                self.draw.line((self.left, y, self.right, y), fill=GRID, width=ZOOM)
            self.draw.line((self.left - 5 * ZOOM, y, self.left, y), fill=INK, width=ZOOM)
            self.draw.text((self.left - 9 * ZOOM, y), text, INK, font(size), anchor="rm")
        box = (self.left, self.top, self.right, self.bottom)
        self.draw.rectangle(box, outline=INK, width=ZOOM)
        middle = (self.left + self.right) / 2
        self.draw.text((middle, self.top - 9 * ZOOM), title, INK, font(size + 4), anchor="mb")
        if xlabel:
            below = self.bottom + (size + 17) * ZOOM
            self.draw.text((middle, below), xlabel, INK, font(size), anchor="mt")

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float = 2) -> None:
        pixels = [self.at(*point) for point in points]
        self.draw.line(pixels, fill=colour, width=round(width * ZOOM), joint="curve")

    def dot(self, x: float, y: float, colour: Colour, radius: float = 4) -> None:
        cx, cy = self.at(x, y)
        r = radius * ZOOM
        self.draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=colour)

    def bar(self, x: float, y: float, half: float, colour: Colour) -> None:
        left, top = self.at(x - half, y)
        right, bottom = self.at(x + half, self.y[0])
        self.draw.rectangle((left, top, right, bottom), fill=colour)

    def legend(self, entries: list[tuple[str, Colour]], size: int = 13) -> None:
        x, y = self.left + 14 * ZOOM, self.top + 14 * ZOOM
        wide = max(self.draw.textlength(text, font(size)) for text, _ in entries) + 58 * ZOOM
        high = len(entries) * (size + 9) * ZOOM + 6 * ZOOM
        self.draw.rectangle((x, y, x + wide, y + high), fill=PAPER, outline=GRID, width=ZOOM)
        for row, (text, colour) in enumerate(entries):
            cy = y + (row + 0.5) * (size + 9) * ZOOM + 3 * ZOOM
            self.draw.line((x + 10 * ZOOM, cy, x + 38 * ZOOM, cy), fill=colour, width=3 * ZOOM)
            self.draw.text((x + 46 * ZOOM, cy), text, INK, font(size), anchor="lm")


def canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (SIZE[0] * ZOOM, SIZE[1] * ZOOM), PAPER)
    return picture, ImageDraw.Draw(picture)


def ticks(values: range | list[int], form: str = "{}") -> list[tuple[float, str]]:
    return [(float(value), form.format(value)) for value in values]


def panels() -> Image.Image:
    """Four panels: damped waves, a scatter with its trend, grouped bars, and a histogram."""
    rng = random.Random(7)
    picture, draw = canvas()
    title = "Sensor trial: four views of one week"
    draw.text((SIZE[0] * ZOOM / 2, 18 * ZOOM), title, INK, font(22), anchor="mt")

    waves = Axes(draw, (82, 96, 486, 352), (0, 10), (-1.2, 1.2))
    waves.frame("(a) Damped response", ticks(range(0, 11, 2)), _halves(), xlabel="time (s)")
    for colour, rate in ((BLUE, 0.12), (ORANGE, 0.3), (GREEN, 0.6)):
        points = [(t / 20, math.exp(-rate * t / 20) * math.cos(t / 8)) for t in range(201)]
        waves.line(points, colour)

    scatter = Axes(draw, (590, 96, 994, 352), (0, 50), (0, 100))
    scatter.frame(
        "(b) Load and temperature", ticks(range(0, 51, 10)), ticks(range(0, 101, 20)), xlabel="load"
    )
    for _ in range(90):
        x = rng.uniform(2, 48)
        scatter.dot(x, min(97.0, max(3.0, 18 + 1.3 * x + rng.gauss(0, 8))), BLUE, 3)
    scatter.line([(2, 20.6), (48, 80.4)], RED, 2.5)

    bars = Axes(draw, (82, 450, 486, 700), (-0.6, 4.6), (0, 50))
    days = [(float(i), day) for i, day in enumerate(("Mon", "Tue", "Wed", "Thu", "Fri"))]
    bars.frame("(c) Faults by day", days, ticks(range(0, 51, 10)), grid=False)
    for day, (left, right) in enumerate(((22, 18), (35, 25), (30, 34), (41, 20), (12, 28))):
        bars.bar(day - 0.19, left, 0.17, BLUE)
        bars.bar(day + 0.19, right, 0.17, ORANGE)
    bars.legend([("line A", BLUE), ("line B", ORANGE)], 11)

    histogram = Axes(draw, (590, 450, 994, 700), (-4, 4), (0, 120))
    histogram.frame(
        "(d) Error distribution", ticks(range(-4, 5, 2)), ticks(range(0, 121, 20)), grid=False
    )
    counts = [0] * 32
    for _ in range(1000):
        counts[min(31, max(0, int((rng.gauss(0, 1.05) + 4) * 4)))] += 1
    for i, count in enumerate(counts):
        histogram.bar(-4 + (i + 0.5) / 4, count, 0.118, (148, 103, 189))
    return picture


def _halves() -> list[tuple[float, str]]:
    return [(value / 2, f"{value / 2:.1f}") for value in range(-2, 3)]


def line_chart() -> Image.Image:
    """Two lines over seven years, every point a multiple of five on a grid of tens."""
    picture, draw = canvas()
    axes = Axes(draw, (104, 92, 984, 678), (2017.6, 2024.4), (0, 100))
    axes.frame(
        "Electricity from sun and wind (TWh)",
        ticks(list(YEARS)),
        ticks(range(0, 101, 10)),
        size=17,
        xlabel="year",
    )
    for values, colour in ((SOLAR, BLUE), (WIND, ORANGE)):
        axes.line([(float(y), float(v)) for y, v in zip(YEARS, values, strict=True)], colour, 4)
        for year, value in zip(YEARS, values, strict=True):
            axes.dot(year, value, colour, 8)
    axes.legend([("solar", BLUE), ("wind", ORANGE)], 18)
    return picture


if __name__ == "__main__":
    main()
