"""Points, tracks and counts out of the text a Molmo model writes.

``parse_points`` reads a whole answer, ``PointStream`` one that is still being written. Which forms
there are and how their numbers are scaled is stated in ``pointing_forms``. Text is untrusted:
whatever it is, nothing here raises over it, and the cost is linear in its length. This module
knows nothing about models.
"""

from __future__ import annotations

import io
import json
import operator
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from molmo_edge.errors import InputError
from molmo_edge.points_forms import Found
from molmo_edge.points_scan import Scanner

if TYPE_CHECKING:
    from PIL import Image

    from molmo_edge.images import ImageLike, ImageLimits

__all__ = ["Point", "PointResult", "PointStream", "parse_points"]


@dataclass(frozen=True)
class Point:
    """One place in a picture: ``x`` to the right and ``y`` down from the top-left corner, 0 to 1.

    Attributes:
        x, y: fractions of the width and height of the *upright* picture (EXIF rotation applied),
            so they hold at any size it is scaled to.
        label: the text between the tags; None if the form has none or the answer was cut off.
        alt: the tag's ``alt`` attribute, None if absent.
        id: the number the model gave the point or tracked object, None if it gave none.
        image_index: which picture of the request, from 0; None where the form does not say.
        t: seconds into the video, None for pictures.

    Raises:
        InputError: a coordinate is not between 0 and 1.
    """

    x: float
    y: float
    label: str | None = None
    alt: str | None = None
    id: int | None = None
    image_index: int | None = None
    t: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise InputError(
                f"A point at x={self.x}, y={self.y} lies outside the picture. Expected fractions "
                "of its width and height, each from 0 to 1."
            )

    def px(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (column, row) of the pixel under the point, always inside a picture of ``size``.

        ``size`` is (width, height) as in ``image.size``, not a NumPy shape, and of the upright
        picture: for one with EXIF rotation, ``ImageOps.exif_transpose(image).size``.
        Raises InputError unless ``size`` is two positive whole numbers.
        """
        try:
            width, height = (operator.index(side) for side in size)
        except (TypeError, ValueError) as exc:
            raise InputError(
                "The size must be two whole numbers, (width, height), as in image.size."
            ) from exc
        if width < 1 or height < 1:
            raise InputError(f"The size {width} x {height} has no pixels; both must be positive.")
        return min(int(self.x * width), width - 1), min(int(self.y * height), height - 1)


@dataclass(frozen=True)
class PointResult:
    """What one answer says about points.

    Attributes:
        text: the answer as generated.
        points: the usable points, in the order of the text.
        stated_count: the number the text itself states ("shows a total of 5"), None if none.
        none_found: the text says there is nothing to point at, and there is no point.
        truncated: the answer was cut off, by its own look or by its finish reason.
        malformed: coordinate pairs outside their scale or unreadable, and tags without any pair.
        image: the picture the answer is about, if known; outside equality, repr and JSON.
    """

    text: str
    points: tuple[Point, ...] = ()
    stated_count: int | None = None
    none_found: bool = False
    truncated: bool = False
    malformed: int = 0
    image: ImageLike | None = field(default=None, compare=False, repr=False)

    @property
    def count(self) -> int:
        """The number of points."""
        return len(self.points)

    @property
    def consistent(self) -> bool | None:
        """Whether the stated number is the number of points; None when none is stated."""
        return None if self.stated_count is None else self.stated_count == self.count

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every field but ``image``, and ``count`` and ``consistent``."""
        return {
            "text": self.text,
            "points": [asdict(point) for point in self.points],
            "count": self.count,
            "stated_count": self.stated_count,
            "consistent": self.consistent,
            "none_found": self.none_found,
            "truncated": self.truncated,
            "malformed": self.malformed,
        }

    def to_json(self) -> str:
        """``as_dict()`` as one line of ASCII JSON."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def draw(
        self,
        image: ImageLike | None = None,
        *,
        image_index: int | None = None,
        limits: ImageLimits | None = None,
    ) -> Image.Image:
        """A new upright RGB picture with a numbered marker on every point.

        Args:
            image: a PIL image or anything else a query takes; by default the result's own. It is
                left as it is.
            image_index: draw only the points of this picture of the request, from 0.
            limits: caps on the picture, if other than the usual ones.

        Numbers are positions in ``points``, from 1.
        Raises InputError if there is no picture, ImageError if it cannot be used.
        """
        from molmo_edge.drawing import draw_marks
        from molmo_edge.images import DEFAULT_LIMITS

        image = self.image if image is None else image
        if image is None:
            raise InputError("There is no picture to draw on: call draw(image).")
        marks = [
            (number, point.x, point.y)
            for number, point in enumerate(self.points, 1)
            if image_index is None or point.image_index == image_index
        ]
        return draw_marks(image, marks, limits or DEFAULT_LIMITS)

    def _repr_png_(self) -> bytes | None:
        if self.image is None:
            return None
        picture = self.draw()
        picture.thumbnail((1280, 1280))  # a notebook keeps every picture it shows
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()


def parse_points(
    text: str, *, truncated: bool = False, image: ImageLike | None = None
) -> PointResult:
    """Read the points of a whole answer. No text makes it raise; its cost is linear.

    ``truncated`` says the answer was cut off (``finish_reason == "length"``); ``image`` is the
    picture it is about, for ``draw()`` and notebooks.
    """
    stream = PointStream()
    stream.feed(text)
    return stream.result(truncated=truncated, image=image)


class PointStream:
    """Finds points while the answer is still being written.

    ``feed`` returns the points its piece of text completed, each exactly once, as soon as both
    numbers are there; a ``label`` or ``alt`` that follows later in the text is None in them.
    ``finish`` returns those that only the end of the text decides: bare ``(x, y)`` pairs count
    only where there is no tag. ``result`` is what ``parse_points`` makes of the joined text, the
    same places in the same order and with their labels, however the text was split.
    """

    def __init__(self) -> None:
        self._text: list[str] = []
        self._scanner = Scanner()
        self._told = 0
        self._ended = False

    def feed(self, text: str) -> list[Point]:
        """Take the next piece of text; return the points it completed.

        Raises InputError after ``finish`` or ``result``.
        """
        if self._ended:
            raise InputError("This point stream has ended; start a new PointStream.")
        self._scanner.feed(text)
        self._text.append(text)
        return self._news()

    def finish(self) -> list[Point]:
        """End the text; return the points not returned before. Once ended, there are none."""
        if not self._ended:
            self._ended = True
            self._scanner.close()
        return self._news()

    def result(self, *, truncated: bool = False, image: ImageLike | None = None) -> PointResult:
        """End the text; return everything it says. The arguments are those of parse_points."""
        self.finish()
        scanner = self._scanner
        prose = scanner.prose.strip().replace("\u2019", "'")
        stated = _stated_count(prose)
        return PointResult(
            text="".join(self._text),
            points=tuple(map(_point, scanner.found)),
            stated_count=stated,
            none_found=not scanner.found and (stated == 0 or bool(_NONE.search(prose))),
            truncated=truncated or scanner.cut,
            malformed=scanner.malformed,
            image=image,
        )

    def _news(self) -> list[Point]:
        found = self._scanner.found[self._told :]
        self._told += len(found)
        return list(map(_point, found))


def _point(found: Found) -> Point:
    return Point(found.x, found.y, found.label, found.alt, found.id, found.image_index, found.t)


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBER_WORDS = {word: number for number, word in enumerate(_ONES)}
_NUMBER_WORDS |= {word: 10 * number for number, word in enumerate(_TENS, 2)}
# Digits with separators stand in groups of three; "12,34", "1.5" and "50%" are no counts.
_NUMBER = (
    r"(?P<digits>\d{1,3}(?:[,_' \u00a0\u2009\u202f]\d{3}){1,3}|\d{1,12})(?![\d%]|[.,]\d)"
    rf"|(?P<tens>{'|'.join(_TENS)})(?:[- ](?P<unit>{'|'.join(_ONES[1:10])}))?\b"
    rf"|(?P<small>{'|'.join(sorted(_ONES, key=len, reverse=True))})\b"
)
_TOTAL = re.compile(rf"\btotal of\s{{1,4}}(?:{_NUMBER})", re.I)
_THERE_ARE = re.compile(rf"\bthere (?:are|is)\s{{1,4}}(?:{_NUMBER})", re.I)
_ALONE = re.compile(rf"(?:{_NUMBER})\.?", re.I)
_NONE = re.compile(
    r"\bthere(?: is| are|'s) (?:none|no (?:such )?[^.!?]{1,80} in (?:the|this|that) )"
    r"|\bthere (?:are|is)(?: not|n't) any\b|\bthere are no\b|\bdo(?: not|n't) see any\b"
    r"|(?:\bnot|n't) (?:present |visible |shown |seen )?in (?:the|this|that) "
    r"(?:image|picture|photo|video|scene)"
    r"|\Anone\.?\Z",
    re.I,
)


def _stated_count(prose: str) -> int | None:
    """The totals a text states, added up; else the number it consists of or begins with."""
    matches = list(_TOTAL.finditer(prose))
    if not matches:
        matches = [m for m in (_ALONE.fullmatch(prose), _THERE_ARE.search(prose)) if m][:1]
    return sum(map(_number, matches)) if matches else None


def _number(match: re.Match[str]) -> int:
    if match["digits"]:
        return int(re.sub(r"\D", "", match["digits"]))
    words = (match["tens"] or "", match["unit"] or "", match["small"] or "")
    return sum(_NUMBER_WORDS.get(word.lower(), 0) for word in words)
