"""Points, tracks and counts out of the text a Molmo model writes, and drawn on the image.

``parse_points`` reads a whole answer, ``PointStream`` one that is still being written. The form of
the text says how its numbers are scaled; a number outside that scale is never tried on another:

* percent, 0-100: ``x="61.5" y="40.4"``, ``x1= y1=``, ``Click(61.5, 40.4)``, ``(61.5, 40.4)``
* tenths of a percent, exactly three digits each: ``p=123,456``, ``1=123,456``
* thousandths, 0-1000: ``coords="frame id x y id x y;frame …"``

Text is untrusted: whatever it is, nothing here raises over it, and reading a whole answer takes
time linear in its length.
"""

from __future__ import annotations

import html
import io
import json
import operator
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from molmo_edge.errors import InputError
from molmo_edge.images import DEFAULT_LIMITS, ImageLike, ImageLimits, load
from molmo_edge.results import Result

__all__ = ["CountResult", "Point", "PointAnswer", "PointResult", "PointStream", "parse_points"]


@dataclass(frozen=True)
class Point:
    """One place in an image: ``x`` to the right and ``y`` down from the top-left corner, 0 to 1.

    Attributes:
        x, y: fractions of the width and height of the *upright* image (EXIF rotation applied), so
            they hold at any size it is scaled to.
        label: the text between the tags; None if the form has none or the answer was cut off.
        alt: the tag's ``alt`` attribute, None if absent.
        id: the number the model gave the point or tracked object, None if it gave none.
        image_index: which image of the request, from 0; None where the form does not say.
        t: seconds into the video, None for images.

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
                f"A point at x={self.x}, y={self.y} lies outside the image. Expected fractions "
                "of its width and height, each from 0 to 1."
            )

    def px(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (column, row) of the pixel under the point, always inside the image.

        Args:
            size: (width, height) as in ``image.size``, not a NumPy shape, and of the upright
                image: for one with EXIF rotation, ``ImageOps.exif_transpose(image).size``.

        Raises:
            InputError: `size` is not two positive integers.
        """
        try:
            width, height = (operator.index(side) for side in size)
        except (TypeError, ValueError) as exc:
            raise InputError(
                "The size must be two integers, (width, height), as in image.size."
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
        image: the image the answer is about, if known; outside equality, repr and JSON.
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
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> Image.Image:
        """Return a new upright RGB image with a dot, its number and its label at every point.

        Args:
            image: a PIL image or anything else a query takes; by default the result's own. It is
                left as it is.
            image_index: draw only the points of this image of the request, from 0.
            limits: caps on the image's bytes and pixels.

        Numbers are positions in ``points``, from 1; a label stands at the first of its points.

        Raises:
            InputError: there is no image.
            ImageError: the image cannot be used.
        """
        image = self.image if image is None else image
        if image is None:
            raise InputError("There is no image to draw on: call draw(image).")
        canvas = load(image, limits)
        texts, labels = [], {None, ""}
        for number, point in enumerate(self.points, 1):
            if image_index is None or point.image_index == image_index:
                text = str(number) if point.label in labels else f"{number} {point.label}"
                labels.add(point.label)
                texts.append((point.px(canvas.size), text))
        _draw(canvas, texts)
        return canvas

    def _repr_png_(self) -> bytes | None:
        if self.image is None:
            return None
        image = self.draw()
        image.thumbnail((1280, 1280))  # a notebook keeps every image it shows
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()


@dataclass(frozen=True, repr=False)
class PointAnswer(PointResult):
    """A `PointResult` with its request.

    Attributes:
        label: what the prompt asked for.
        result: the answer it was read from, with its metrics; outside equality and repr.
    """

    label: str = ""
    result: Result | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"PointAnswer({self.label!r}, {self.count} points, truncated={self.truncated})"

    def as_dict(self) -> dict[str, Any]:
        """As `PointResult.as_dict`, with the label and the metrics."""
        return {
            "label": self.label,
            **super().as_dict(),
            "metrics": None if self.result is None else asdict(self.result.metrics),
        }


@dataclass(frozen=True)
class CountResult:
    """How many there are, and how that is known.

    Attributes:
        number: the count; None when the answer says nothing about it.
        how: ``"points"``: the number of points in the answer; ``"stated"``: it has no point but
            names a number; ``"none"``: it says that there are none; ``"unread"``: nothing of that.
        points: everything read from the answer, and the answer itself.
    """

    number: int | None
    how: Literal["points", "stated", "none", "unread"]
    points: PointAnswer

    @classmethod
    def of(cls, points: PointAnswer) -> CountResult:
        """Count points before words: what a model points at can be looked at."""
        if points.points:
            return cls(points.count, "points", points)
        if points.none_found and not points.stated_count:
            return cls(0, "none", points)
        if points.stated_count is not None:
            return cls(points.stated_count, "stated", points)
        return cls(None, "unread", points)

    @property
    def consistent(self) -> bool | None:
        """Whether the stated number is the number of points; None unless there are both."""
        return self.points.consistent if self.points.points else None

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut off; `number` is then a lower bound."""
        return self.points.truncated

    @property
    def result(self) -> Result | None:
        """The answer, with its metrics."""
        return self.points.result

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what was read from the answer stands under ``points``."""
        return {
            "number": self.number,
            "how": self.how,
            "consistent": self.consistent,
            "truncated": self.truncated,
            "points": self.points.as_dict(),
        }


def parse_points(
    text: str, *, truncated: bool = False, image: ImageLike | None = None
) -> PointResult:
    """Read the points of a whole answer. No text makes it raise.

    Args:
        text: the answer.
        truncated: the answer was cut off (``finish_reason == "length"``).
        image: the image it is about, for ``draw()`` and notebooks.
    """
    scan = _Scan(text, final=True)
    prose = "".join(scan.prose).strip().replace("\u2019", "'")
    stated = _stated_count(prose)
    return PointResult(
        text=text,
        points=tuple(scan.points),
        stated_count=stated,
        none_found=not scan.points and (stated == 0 or bool(_NONE.search(prose))),
        truncated=truncated or scan.cut,
        malformed=scan.malformed,
        image=image,
    )


class PointStream:
    """Finds points while the answer is still being written.

    ``feed`` returns the points its piece of text completed, each exactly once, as soon as both
    numbers are there; a ``label`` or ``alt`` that follows later in the text is None in them.
    ``finish`` returns those that only the end of the text decides: bare ``(x, y)`` pairs count
    only where there is no tag. ``result`` is what ``parse_points`` makes of the joined text, the
    same places in the same order and with their labels, however the text was split. Each call
    reads the text anew: about a millisecond for an answer of a hundred points.
    """

    def __init__(self) -> None:
        self._text = ""
        self._returned = 0
        self._ended = False

    def feed(self, text: str) -> list[Point]:
        """Take the next piece of text; return the points it completed.

        Raises InputError after ``finish`` or ``result``.
        """
        if self._ended:
            raise InputError("This point stream has ended; start a new PointStream.")
        self._text += text
        return self._new(_Scan(self._text, final=False))

    def finish(self) -> list[Point]:
        """End the text; return the points not returned before. Once ended, there are none."""
        if self._ended:
            return []
        self._ended = True
        return self._new(_Scan(self._text, final=True))

    def result(self, *, truncated: bool = False, image: ImageLike | None = None) -> PointResult:
        """End the text; return everything it says. The arguments are those of parse_points."""
        self._ended = True
        return parse_points(self._text, truncated=truncated, image=image)

    def _new(self, scan: _Scan) -> list[Point]:
        points = scan.points[self._returned :]
        self._returned += len(points)
        return points


# Quantifiers over more than one character class are bounded or possessive: no text is slow.
_TAG = r"<(?P<close>/?)(?P<kind>points?|tracks)(?=[\s/>])"
_START = re.compile(
    rf"(?i:{_TAG})|Click\((?=(?a:\s{{0,80}}[-+.\d]))(?P<click>[^()<]{{0,80}})(?P<end>\)|\Z)"
)
_NEXT_TAG = re.compile(_TAG, re.I)
_TAG_STARTS = ("<points", "<tracks", "</points", "</tracks")
_IN_TAG = re.compile(rf"/?>|{_TAG}|(?P<name>(?a:\w[\w:.-]{{0,31}}))(?P<equals>\s*+=\s*+)?", re.I)
_COORDINATE = re.compile(r"([xy])(\d{0,6})", re.A)
_NUMBERED = re.compile(r"p|\d{1,6}", re.A)
_QUOTED = re.compile(r"[-+.,\d\s]{0,64}", re.A)
_UNQUOTED = re.compile(r"[-+.\d]{0,32}(?:,\s{0,4}[-+.\d]{0,32})?", re.A)
_FRAMES = re.compile(r"[-+.\d\s;:,]*", re.A)
_FRAME_END = re.compile(r"[;:,\t]")
_LAST_Y = re.compile(r"1000|(?!100)\d{3}", re.A)
_VALUE_END = {
    '"': re.compile(rf'"|{_TAG}', re.I),
    "'": re.compile(rf"'|{_TAG}", re.I),
    "": re.compile(rf"[\s>]|/>|{_TAG}", re.I),
}
_BARE = re.compile(
    r"\(\s{0,4}([-+]?\d{1,24}+\.\d{1,24}+)(?:\s{0,4},\s{0,4}|\s{1,4})"
    r"([-+]?\d{1,24}+\.\d{1,24}+)\s{0,4}\)",
    re.A,
)
_BARE_CUT = re.compile(r"\(\s?\d{1,3}\.[\d\s,.]{0,12}\Z", re.A)
_PERCENT = re.compile(r"\d{1,9}(?:\.\d{0,20})?|\.\d{1,20}", re.A)
_TENTHS = re.compile(r"(\d{3})\s{0,8},\s{0,8}(\d{3})", re.A)
_FRAME = re.compile(r"\d{1,9}(?:\.\d{0,6})?", re.A)
# With bounds and a semicolon: html.unescape alone raises on thousands of digits and reads
# "R&notes" as "R¬es".
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});", re.A)


class _Place(NamedTuple):
    x: float
    y: float
    id: int | None = None
    image_index: int | None = None
    t: float | None = None


class _Scan:
    """Everything a text says.

    Attributes:
        points: the usable points, in the order in which they become complete; while the text is
            not `final`, those that no further text can change.
        malformed: pairs that cannot be used, and tags without any pair.
        cut: the text ends inside a tag or a pair.
        prose: the text outside of tags, in pieces.
    """

    def __init__(self, text: str, *, final: bool) -> None:
        self.points: list[Point] = []
        self.malformed = 0
        self.cut = False
        self.prose: list[str] = []
        self._text, self._final = text, final
        explicit = False  # a tag or a Click: bare pairs are mere prose
        at = 0
        while (start := _START.search(text, at)) and start["end"] != "":
            self.prose.append(text[at : start.start()])
            at = start.end()
            if start["close"]:
                at += text[at] == ">"
                continue
            explicit = True
            if start["kind"]:
                at = self._read_tag(at, timed=start["kind"].lower() == "tracks")
            else:
                self._add_pair(*start["click"].replace(",", " ", 1).split())
        self.prose.append(text[at:])
        self.cut |= start is not None or bool(self._partial_tag())
        if final and not explicit:
            prose = "".join(self.prose)
            for pair in _BARE.finditer(prose):
                self._add_pair(*pair.groups())
            self.cut |= _BARE_CUT.search(prose, max(0, len(prose) - 20)) is not None

    def _add_pair(self, *numbers: str) -> None:
        x, y = map(_percent, numbers) if len(numbers) == 2 else (None, None)
        if x is None or y is None:
            self.malformed += 1
        else:
            self.points.append(Point(x, y))

    def _partial_tag(self) -> str:
        """The first characters of a tag that the text ends in."""
        tail = self._text[max(0, self._text.rfind("<")) :][:9]
        begun = len(tail) > 2 and any(start.startswith(tail.lower()) for start in _TAG_STARTS)
        return tail if begun else ""

    def _read_tag(self, at: int, *, timed: bool) -> int:
        """Read the attributes and the body of a tag; return where to go on."""
        tag = _Tag(self._text, at, timed=timed, final=self._final)
        self.malformed += tag.malformed
        self.cut |= tag.cut
        label, at = None, tag.end
        if tag.has_body:
            end = _NEXT_TAG.search(self._text, at)
            partial = "" if end else self._partial_tag()
            body = self._text[at : end.start() if end else None].removesuffix(partial)
            at += len(body)
            self.cut |= end is None
            if (end and end["close"]) or (self._final and partial.startswith("</")):
                label = _clean(body)
            else:  # never closed: what follows the tag is prose
                self.prose.append(body)
        self.points += [
            Point(x, y, label, tag.alt, id, image_index, t)
            for x, y, id, image_index, t in tag.places
        ]
        return at


class _Tag:
    """The attributes of one tag, read from `at` to its ``>``, the next tag or the end."""

    def __init__(self, text: str, at: int, *, timed: bool, final: bool) -> None:
        self.places: list[_Place] = []
        self.alt: str | None = None
        self.malformed = 0
        self._text, self._timed, self._final = text, timed, final
        self._halves: dict[int | None, tuple[str, float | None]] = {}
        while (token := _IN_TAG.search(text, at)) and token["name"]:
            at = token.end()
            if token["equals"]:
                at = self._read_value(at, token["name"].lower())
        self.cut = token is None
        self.has_body = token is not None and token[0] == ">"
        halves = [y for _, y in self._halves.values()]
        if token is None:
            self.end = len(text)
            self.malformed += halves.count(None)
        else:
            self.end = token.start() if token["kind"] else token.end()
            self.malformed += len(halves) or not (self.places or self.malformed)

    def _read_value(self, at: int, name: str) -> int:
        """Read the value that begins at `at`; return where to go on."""
        quote = self._text[at : at + 1]
        quote = quote if quote in ('"', "'") else ""
        at += len(quote)
        if name == "coords":
            return self._read_frames(at, quote)
        if _COORDINATE.fullmatch(name) or _NUMBERED.fullmatch(name):
            return self._read_number(at, quote, name)
        end = _VALUE_END[quote].search(self._text, at)
        if end is None:
            return len(self._text)
        if end["kind"]:  # the closing quote is missing, so the value is unknown
            return end.start()
        if name == "alt":
            self.alt = _clean(self._text[at : end.start()])
        return end.start() + len(quote)

    def _read_number(self, at: int, quote: str, name: str) -> int:
        run = (_QUOTED if quote else _UNQUOTED).match(self._text, at)
        assert run is not None
        number, after = run[0], self._text[run.end() : run.end() + 1]
        # A missing closing quote is forgiven where the number plainly ends.
        ended = after != "" and (after in "\"'<>/" or after.isspace() or number[-1:].isspace())
        if coordinate := _COORDINATE.fullmatch(name):
            if after:  # the end of the text may have cut digits off
                x = _percent(number.strip(" \t\r\n,")) if ended else None
                self._add_half(coordinate[1], _integer(coordinate[2]), x)
        elif after or self._final:
            pair = _TENTHS.fullmatch(number.strip())
            if pair and (ended or not after):
                x, y = int(pair[1]) / 1000, int(pair[2]) / 1000
                self.places.append(_Place(x, y, _integer(name)))
            else:
                self.malformed += after != ""
        return run.end() + (after == quote != "")

    def _add_half(self, axis: str, key: int | None, value: float | None) -> None:
        other = self._halves.pop(key, None)
        if other is None or other[0] == axis:
            self.malformed += other is not None
            self._halves[key] = (axis, value)
            return
        x, y = (other[1], value) if axis == "y" else (value, other[1])
        if x is None or y is None:
            self.malformed += 1
        else:
            self.places.append(_Place(x, y, key))

    def _read_frames(self, at: int, quote: str) -> int:
        run = _FRAMES.match(self._text, at)
        assert run is not None
        after = self._text[run.end() : run.end() + 1]
        *frames, last = [frame.split() for frame in _FRAME_END.split(run[0])]
        for numbers in frames:
            self._read_frame(numbers, ended=True)
        if not after and last and not run[0][-1].isspace():
            # Of a cut-off pair, only a y that no further digit could follow is complete.
            awaits_y = len(last) > 1 and len(last) % 3 == 1
            if not (self._final and awaits_y and _LAST_Y.fullmatch(last[-1])):
                last.pop()
        self._read_frame(last, ended=after != "")
        return run.end() + (after == quote != "")

    def _read_frame(self, numbers: list[str], *, ended: bool) -> None:
        frame, *triples = numbers or [""]
        slipped = ended and len(triples) % 3 > 0
        known = _FRAME.fullmatch(frame) is not None
        waiting: list[_Place] = []
        for name, *xy in zip(*[iter(triples)] * 3, strict=False):
            id, (x, y) = _integer(name), map(_integer, xy)
            if id is None or x is None or y is None or max(x, y) > 1000 or not known:
                self.malformed += 1
                continue
            t = float(frame) if self._timed or "." in frame else None
            index = int(frame) - 1 if t is None and int(frame) > 0 else None
            place = _Place(x / 1000, y / 1000, id, index, t)
            # The form pads to three digits. A shorter number may mean that one is missing and all
            # have slipped: such a pair waits until the frame's numbers are known to add up.
            if waiting or min(map(len, xy)) < 3:
                waiting.append(place)
            else:
                self.places.append(place)
        if slipped:
            self.malformed += 1 + len(waiting)
        else:
            self.malformed += ended and bool(numbers) and not triples
            self.places += waiting if ended or self._final else []


def _percent(text: str) -> float | None:
    """A number from 0 to 100 as 0 to 1, None if it is anything else."""
    # Shifted in decimal: 40.4 / 100 is 0.40399999999999997, and so below its pixel's edge.
    value = float(text + "e-2") if _PERCENT.fullmatch(text) else None
    return value if value is not None and value <= 1 else None


def _integer(text: str) -> int | None:
    """An integer of at most nine ASCII digits, else None."""
    return int(text) if len(text) <= 9 and text.isascii() and text.isdecimal() else None


def _clean(text: str) -> str:
    """A label without HTML entities and outer blanks."""
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text).strip()


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


# Neighbours in the list differ strongly, so that neighbouring numbers can be told apart.
_COLOURS = (
    (255, 0, 110), (0, 220, 60), (60, 130, 255), (255, 190, 0),
    (190, 60, 255), (0, 215, 225), (255, 95, 30), (170, 225, 20),
)  # fmt: skip


def _draw(canvas: Image.Image, marks: list[tuple[tuple[int, int], str]]) -> None:
    """Draw a dot and a text at each (column, row): rings and badges show on any background."""
    width, height = canvas.size
    size = max(10, round(0.028 * min((width * height) ** 0.5, 2 * min(width, height))))
    # Pillow builds without FreeType have one bitmap font of one size, and Latin-1 only.
    font = ImageFont.load_default(size if features.check("freetype2") else None)
    line, radius = max(1, round(size * 0.1)), max(2, round(size * 0.25))
    pad, reach = 2 * line + 1, radius + 2 * line
    draw = ImageDraw.Draw(canvas)
    for index, ((column, row), text) in enumerate(marks):
        text = "".join(char if char.isprintable() else " " for char in text[:60])
        text = text.encode("latin-1", "replace").decode("latin-1")
        left, top, right, bottom = (round(side) for side in draw.textbbox((0, 0), text, font))
        wide, tall = right - left + 2 * pad, bottom - top + 2 * pad
        x = max(0, min(column + reach, width - wide))
        y = max(0, min(row - reach - tall, height - tall))
        box = (x, y, x + wide - 1, y + tall - 1)
        draw.rectangle(box, (0, 0, 0), _COLOURS[index % len(_COLOURS)], line)
        draw.text((x + pad - left, y + pad - top), text, (255, 255, 255), font)
    # After the texts, so that none hides a dot.
    for index, ((column, row), _) in enumerate(marks):
        colour = _COLOURS[index % len(_COLOURS)]
        for r, fill in ((reach, (0, 0, 0)), (radius + line, (255, 255, 255)), (radius, colour)):
            draw.ellipse((column - r, row - r, column + r, row + r), fill)
