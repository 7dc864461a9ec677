"""What is asked: the three standard cases, pictures of the user's own, and fresh copies of them.

The standard cases follow the 2025 report, whose own pictures were never published: a dense
caption of a nature scene, a multi-panel plot, and values read off a line chart, for which the
right answers are known. The pictures are drawn by ``benchmarks/make_cases.py``.

This module knows nothing about engines or timing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from io import BytesIO
from pathlib import Path

from PIL import Image

from molmo_edge.bench.document import Picture
from molmo_edge.errors import BenchmarkError, MolmoEdgeError

DEFAULT_QUESTION = "Describe this image in detail."


@dataclass(frozen=True)
class Case:
    """One question, with or without a picture, and the values a right answer holds, in order."""

    name: str
    title: str
    question: str
    image: Image.Image | None = field(default=None, repr=False, compare=False)
    expected: tuple[str, ...] = ()
    max_crops: int | None = None

    def picture(self) -> Picture | None:
        """The picture's description for the result document."""
        if self.image is None:
            return None
        digest = hashlib.sha256(self.image.tobytes()).hexdigest()
        width, height = self.image.size
        return Picture(name=self.name, width=width, height=height, sha256=digest)


def standard() -> tuple[Case, ...]:
    """The report's three cases, with the pictures shipped in the package."""
    return (
        Case(
            "boardwalk",
            "Boardwalk Photo",
            "Describe this image in detail.",
            _shipped("boardwalk.jpg"),
        ),
        Case(
            "panels",
            "Complex Plot",
            "Explain this figure: what does each of the panels show, and what is to be learned?",
            _shipped("panels.png"),
        ),
        Case(
            "linechart",
            "Data Interpretation",
            "What is the value of the solar line in each year, from 2018 to 2024?",
            _shipped("linechart.png"),
            ("10", "15", "25", "40", "55", "70", "85"),
        ),
    )


def text_only() -> tuple[Case, ...]:
    """Questions without a picture, a short and a long one."""
    story = " ".join(
        f"Shelf {n} holds {n * 3 % 17 + 1} boxes of bolts and {n * 7 % 11 + 1} of nuts."
        for n in range(1, 41)
    )
    return (
        Case("text-short", "Short text", "Write a short story about a robot in a garden."),
        Case("text-long", "Long text", f"{story} Summarise this list in a few sentences."),
    )


def own(paths: Sequence[Path], question: str | None = None) -> tuple[Case, ...]:
    """A case for each picture file of the user's.

    Raises:
        BenchmarkError: a file is missing or is no picture that molmo_edge takes.
    """
    cases = []
    for path in paths:
        cases.append(Case(path.stem, path.name, question or DEFAULT_QUESTION, _opened(path)))
    names = [case.name for case in cases]
    return tuple(
        replace(case, name=f"{case.name}-{i + 1}") if names.count(case.name) > 1 else case
        for i, case in enumerate(cases)
    )


def swept(
    cases: Sequence[Case],
    sizes: Sequence[tuple[int, int]] = (),
    crops: Sequence[int] = (),
) -> tuple[Case, ...]:
    """Every case at every (width, height) in pixels and every ``max_crops``; empty: as it is."""
    out = []
    for case in cases:
        for size in sizes or (None,):
            for limit in crops or (None,):
                if case.image is None or (size is None and limit is None):
                    out.append(case)
                    continue
                name, title, image = case.name, case.title, case.image
                if size is not None:
                    image = image.resize(size, Image.Resampling.LANCZOS)
                    name, title = f"{name}-{size[0]}x{size[1]}", f"{title} {size[0]}x{size[1]}"
                if limit is not None:
                    name, title = f"{name}-crops{limit}", f"{title}, {limit} crops"
                changed = replace(case, name=name, title=title, image=image, max_crops=limit)
                out.append(changed)
    return tuple(dict.fromkeys(out))


def fresh(image: Image.Image, number: int) -> Image.Image:
    """A copy that no cache can have seen: ``number`` is written into one corner's pixels.

    Copies differ for every number below 2**24; size and content stay what they were.
    """
    copy = image.convert("RGB")
    if copy is image:
        copy = image.copy()
    corner = (copy.width - 1, copy.height - 1)
    copy.putpixel(corner, (number >> 16 & 255, number >> 8 & 255, number & 255))
    return copy


def matched(expected: Sequence[str], answer: str) -> int:
    """How many of the expected numbers the answer holds in the expected order.

    Longest common subsequence over the numbers of the text, so that years or a slip in
    between neither help nor spoil the rest.
    """
    said = re.findall(r"\d+(?:\.\d+)?", answer)
    best = [0] * (len(said) + 1)
    for value in expected:
        row = [0]
        for j, word in enumerate(said):
            same = float(word) == float(value)
            row.append(best[j] + 1 if same else max(best[j + 1], row[j]))
        best = row
    return best[-1]


def _shipped(name: str) -> Image.Image:
    data = resources.files("molmo_edge.bench").joinpath("data", name).read_bytes()
    with Image.open(BytesIO(data)) as picture:
        return picture.convert("RGB")


def _opened(path: Path) -> Image.Image:
    from molmo_edge import images

    try:
        return images.load(path)
    except MolmoEdgeError as exc:
        raise BenchmarkError(f"cannot use the picture {path}: {exc}") from exc
