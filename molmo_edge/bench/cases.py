"""What a benchmark asks: the three standard cases, images of the user's own, and fresh copies.

The standard cases follow the 2025 report, whose own images were never published: a dense caption
of a nature scene, a multi-panel plot, and values read off a line chart, for which the right answers
are known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from importlib import resources
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from molmo_edge import images
from molmo_edge.errors import BenchmarkError, MolmoEdgeError
from molmo_edge.video import Video

DEFAULT_QUESTION = "Describe this image in detail."


@dataclass(frozen=True)
class Case:
    """One question, and the values a right answer holds, in order."""

    name: str
    title: str
    question: str
    image: Image.Image | None = None
    expected: tuple[str, ...] = ()
    max_crops: int | None = None
    video: Video | None = None


def standard() -> tuple[Case, ...]:
    """The report's three cases, with the images shipped in the package."""
    panels = "Explain this figure: what does each of the panels show, and what is to be learned?"
    chart = "What is the value of the solar line in each year, from 2018 to 2024?"
    return (
        Case("boardwalk", "Boardwalk Photo", DEFAULT_QUESTION, shipped("boardwalk.jpg")),
        Case("panels", "Complex Plot", panels, shipped("panels.png")),
        Case(
            "linechart",
            "Data Interpretation",
            chart,
            shipped("linechart.png"),
            ("10", "15", "25", "40", "55", "70", "85"),
        ),
    )


def text_only() -> tuple[Case, ...]:
    """Questions without an image, a short and a long one."""
    shelves = " ".join(
        f"Shelf {n} holds {n * 3 % 17 + 1} boxes of bolts and {n * 7 % 11 + 1} of nuts."
        for n in range(1, 41)
    )
    return (
        Case("text-short", "Short text", "Write a short story about a robot in a garden."),
        Case("text-long", "Long text", f"{shelves} Summarise this list in a few sentences."),
    )


def drawn_video(frames: int) -> Case:
    """A disc that crosses a photo, as many frames of 640 x 480 pixels at 2 frames per second."""
    photo = shipped("boardwalk.jpg").resize((640, 480))
    drawn = [photo.copy() for _ in range(frames)]
    for number, frame in enumerate(drawn):
        x, y = 40 + 560 * number // max(1, frames - 1), 240
        ImageDraw.Draw(frame).ellipse((x - 30, y - 30, x + 30, y + 30), fill="red")
    video = Video(drawn, timestamps=[number / 2 for number in range(frames)])
    question = "Describe what moves in this video, from where to where."
    return Case(f"video-{frames}", f"{frames} frames", question, video=video)


def own(paths: Sequence[Path], question: str | None = None) -> tuple[Case, ...]:
    """A case for each image file of the user's; BenchmarkError for what cannot be loaded."""
    cases = []
    for number, path in enumerate(paths, 1):
        try:
            image = images.load(path)
        except MolmoEdgeError as exc:
            raise BenchmarkError(f"cannot use the image {path}: {exc}") from exc
        same = sum(other.stem == path.stem for other in paths) > 1
        name = f"{path.stem}-{number}" if same else path.stem
        cases.append(Case(name, path.name, question or DEFAULT_QUESTION, image))
    return tuple(cases)


def small(case: Case) -> Case:
    """The case with an image of one crop; more take minutes on a CPU."""
    return replace(case, image=case.image and case.image.resize((336, 336)))


def fresh(image: Image.Image, number: int) -> Image.Image:
    """A copy that no cache has seen: ``number``, below 2**24, is written into a corner pixel."""
    copy = image.convert("RGB") if image.mode != "RGB" else image.copy()
    corner = (copy.width - 1, copy.height - 1)
    copy.putpixel(corner, (number >> 16 & 255, number >> 8 & 255, number & 255))
    return copy


def count_matches(expected: Sequence[str], answer: str) -> int:
    """How many of the expected numbers the answer holds in order, whatever is in between."""
    numbers = [float(word) for word in re.findall(r"\d+(?:\.\d+)?", answer)]
    pairs = SequenceMatcher(None, [float(value) for value in expected], numbers, autojunk=False)
    return sum(block.size for block in pairs.get_matching_blocks())


def shipped(name: str) -> Image.Image:
    data = resources.files("molmo_edge.bench").joinpath("data", name).read_bytes()
    with Image.open(BytesIO(data)) as image:
        return image.convert("RGB")
