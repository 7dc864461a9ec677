"""Points, tracks and counts out of the text a Molmo model writes, and drawn on the image.

The form of the text says how its numbers are scaled; a number outside that scale is never tried on
another:

* percent, 0-100: ``x="61.5" y="40.4"``, ``x1= y1=``, ``Click(61.5, 40.4)``, ``(61.5, 40.4)``
* tenths of a percent, exactly three digits each: ``p=123,456``, ``1=123,456``
* thousandths, 0-1000: ``coords="frame id x y id x y;frame …"``

Text is untrusted: none makes ``parse_points`` raise, and reading takes time linear in its length.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from molmo_edge.errors import InputError
from molmo_edge.images import DEFAULT_LIMITS, ImageLike, ImageLimits, load
from molmo_edge.results import Result, paragraph
from molmo_edge.video import Clip, write_video

_NO_LIMITS = ImageLimits(sys.maxsize, sys.maxsize)  # those of the engine held when it answered


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
        frame: the nearest of the sampled frames, from 0; None for images, and after the video.

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
    frame: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise InputError(
                f"A point at x={self.x}, y={self.y} lies outside the image. Expected fractions "
                "of its width and height, each from 0 to 1."
            )

    def px(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (column, row) of the pixel under the point, always inside the image.

        Args:
            size: (width, height) of the upright image as in ``image.size``, not a NumPy shape.

        Raises:
            InputError: `size` is not two positive numbers.
        """
        if len(size) != 2 or min(size) < 1:
            raise InputError("The size must be (width, height) in pixels, as in image.size.")
        width, height = size
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
        label: what the prompt asked for, if known.
        images: the images, or sampled frames of the video, that the answer is about, if known;
            outside equality, repr and JSON.
        result: the answer with its metrics, if known; outside equality and repr.
    """

    text: str
    points: tuple[Point, ...] = ()
    stated_count: int | None = None
    none_found: bool = False
    truncated: bool = False
    malformed: int = 0
    label: str = ""
    images: Sequence[ImageLike] = field(default=(), compare=False, repr=False)
    result: Result | None = field(default=None, compare=False, repr=False)

    @property
    def image(self) -> ImageLike | None:
        """The first of the images, None if there is none."""
        return self.images[0] if self.images else None

    @property
    def count(self) -> int:
        """The number of points."""
        return len(self.points)

    @property
    def consistent(self) -> bool | None:
        """Whether the stated number is the number of points; None when none is stated."""
        return None if self.stated_count is None else self.stated_count == self.count

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "label": self.label,
            "text": self.text,
            "points": [asdict(point) for point in self.points],
            "count": self.count,
            "stated_count": self.stated_count,
            "consistent": self.consistent,
            "none_found": self.none_found,
            "truncated": self.truncated,
            "malformed": self.malformed,
            "metrics": None if self.result is None else asdict(self.result.metrics),
        }

    def to_json(self) -> str:
        """``as_dict()`` as one line of ASCII JSON."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def placed(self, images: Sequence[ImageLike], clip: Clip | None) -> PointResult:
        """Return the points as those of `images`, or of a clip that the answer is about.

        What the form calls a frame is an image's number or a time; of a single image it says
        nothing. Points in images that there are not count as malformed; at times after the video
        they have no frame.
        """
        points = []
        for point in self.points:
            number = point.t if point.image_index is None else point.image_index + 1.0
            if clip is not None:
                frame = None if number is None else _nearest(clip.times, number)
                points.append(replace(point, image_index=None, t=number, frame=frame))
                continue
            index = None if number is None else 0 if len(images) == 1 else int(number) - 1
            if index is None or 0 <= index < len(images):
                points.append(replace(point, image_index=index, t=None))
        return replace(
            self,
            points=tuple(points),
            malformed=self.malformed + len(self.points) - len(points),
            images=images if clip is None else clip.frames,
        )

    def draw(self, image: ImageLike | None = None, *, index: int = 0) -> Image.Image:
        """Return a new upright RGB image with a dot, its number and its label at every point.

        Args:
            image: anything a query takes, within the default limits of `molmo_edge.images`; by
                default the one of `images` with this `index`, of any size.
            index: which of several images, or of a video's frames; only its points are drawn.

        Numbers are positions in ``points``, from 1; a label stands at the first of its points.

        Raises:
            InputError: there is no image.
            ImageError: the image cannot be used.
        """
        limits = DEFAULT_LIMITS
        if image is None:
            if not 0 <= index < len(self.images):
                raise InputError("There is no such image to draw on: call draw(image).")
            image, limits = self.images[index], _NO_LIMITS
        canvas = load(image, limits)

        def shown(point: Point) -> bool:
            if point.t is not None and self.images:
                return point.frame == index
            return len(self.images) < 2 or point.image_index == index

        _draw(canvas, {n: point for n, point in enumerate(self.points, 1) if shown(point)})
        return canvas

    def _repr_html_(self) -> str:
        """For notebooks: what was found, and the first images that have points."""
        places = {point.frame or point.image_index or 0 for point in self.points}
        images = [self.draw(index=i) for i in sorted(places)[:_SHOWN] if i < len(self.images)]
        read = self.label and (self.points or self.none_found)
        return _as_html(f"{self.label}: {self.count}" if read else self.text, images)


@dataclass(frozen=True)
class CountResult:
    """How many there are, and how that is known.

    Attributes:
        number: the count, a lower bound if the answer was cut off (``points.truncated``); None
            when the answer says nothing about it.
        how: ``"points"``: the number of points in the answer; ``"stated"``: it has no point but
            names a number; ``"none"``: it says that there are none; ``"unread"``: nothing of that.
        points: everything read from the answer, and the answer itself.
    """

    number: int | None
    how: Literal["points", "stated", "none", "unread"]
    points: PointResult

    @classmethod
    def of(cls, points: PointResult) -> CountResult:
        """Count points before words: what a model points at can be looked at."""
        if points.points:
            return cls(points.count, "points", points)
        if points.none_found and not points.stated_count:
            return cls(0, "none", points)
        if points.stated_count is None:
            return cls(None, "unread", points)
        return cls(points.stated_count, "stated", points)

    @property
    def consistent(self) -> bool | None:
        """Whether the stated number is the number of points; None unless there are both."""
        return self.points.consistent if self.points.points else None

    def _repr_html_(self) -> str:
        return self.points._repr_html_()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "number": self.number,
            "how": self.how,
            "consistent": self.consistent,
            "points": self.points.as_dict(),
        }


class TrackPoint(NamedTuple):
    """Where an object is at a time: seconds, and fractions of the frame's width and height."""

    time_s: float
    x: float
    y: float


@dataclass(frozen=True)
class TrackResult:
    """Where objects are while a video runs.

    Attributes:
        text: the answer as generated.
        tracks: object id → its positions in the order of time, one for each time; an object that
            is hidden for a while has none for that while.
        none_found, truncated, malformed, label, result: as in `PointResult`.
        clip: the sampled frames of the video; outside equality, repr and JSON.
    """

    text: str
    tracks: Mapping[int, tuple[TrackPoint, ...]]
    none_found: bool = False
    truncated: bool = False
    malformed: int = 0
    label: str = ""
    clip: Clip | None = field(default=None, compare=False, repr=False)
    result: Result | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, points: PointResult, clip: Clip | None = None) -> TrackResult:
        """Return the tracks of points; the second point of an object at one time is dropped."""
        tracks: dict[int, dict[float, TrackPoint]] = {}
        for point in points.points:
            if point.id is not None and point.t is not None:
                track = tracks.setdefault(point.id, {})
                track.setdefault(point.t, TrackPoint(point.t, point.x, point.y))
        return cls(
            points.text,
            {id: tuple(sorted(track.values())) for id, track in sorted(tracks.items())},
            points.none_found,
            points.truncated,
            points.malformed,
            points.label,
            clip,
            points.result,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "label": self.label,
            "text": self.text,
            "tracks": {
                str(id): [point._asdict() for point in track] for id, track in self.tracks.items()
            },
            "none_found": self.none_found,
            "truncated": self.truncated,
            "malformed": self.malformed,
            "metrics": None if self.result is None else asdict(self.result.metrics),
        }

    def to_json(self) -> str:
        """``as_dict()`` as one line of ASCII JSON."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def draw(self, path: str | Path) -> None:
        """Write the sampled frames as an MP4 video, with a dot and its id at every position.

        It runs at the frames' mean rate.

        Raises:
            InputError: there is no clip.
            VideoError, MissingDependencyError: as `molmo_edge.video.write_video`.
        """
        if self.clip is None:
            raise InputError("There is no video to draw on: only EdgeVLM.track knows it.")
        times = self.clip.times
        frames = map(np.asarray, self._drawn(self.clip, range(len(times))))
        seconds = times[-1] - times[0]
        write_video(path, frames, (len(times) - 1) / seconds if seconds > 0 else 1.0)

    def _drawn(self, clip: Clip, frames: Iterable[int]) -> Iterator[Image.Image]:
        """Frames of the clip with their positions."""
        marks: list[dict[int, Point]] = [{} for _ in clip.frames]
        for id, track in self.tracks.items():
            for t, x, y in track:
                if (frame := _nearest(clip.times, t)) is not None:
                    marks[frame][id] = Point(x, y)
        for frame in frames:
            canvas = Image.fromarray(clip.frames[frame]).resize(clip.size)
            _draw(canvas, marks[frame])
            yield canvas

    def _repr_html_(self) -> str:
        """For notebooks: how many there are, and frames from the first to the last."""
        images: Iterable[Image.Image] = ()
        if self.clip is not None:
            last = len(self.clip.frames) - 1
            shown = sorted({round(last * i / (_SHOWN - 1)) for i in range(_SHOWN)})
            images = self._drawn(self.clip, shown)
        return _as_html(f"{self.label}: {len(self.tracks)}" if self.label else self.text, images)


_SHOWN = 3  # images in a notebook
_SHOWN_PX = 640  # longest side of each


def _as_html(text: str, images: Iterable[Image.Image]) -> str:
    parts = [paragraph(text)]
    for image in images:
        image.thumbnail((_SHOWN_PX, _SHOWN_PX))
        png = io.BytesIO()
        image.save(png, "png")
        data = base64.b64encode(png.getvalue()).decode()
        parts.append(f'<img src="data:image/png;base64,{data}" alt="">')
    return "".join(parts)


def _nearest(times: Sequence[float], t: float) -> int | None:
    """The frame nearest to `t`; None well after the last, where there is no image."""
    spacing = (times[-1] - times[0]) / max(len(times) - 1, 1)
    if t > times[-1] + max(spacing, 1.0):
        return None
    return int(np.abs(np.subtract(times, t)).argmin())


def parse_points(text: str) -> PointResult:
    """Read the points of an answer. No text makes it raise.

    An answer that is still being written gives the points that are complete so far, those of a tag
    before its closing tag without a label, and pairs outside of tags until a tag comes.
    """
    scan = _Scan(text)
    prose = scan.prose.strip().replace("\u2019", "'")
    stated = _stated_count(prose)
    return PointResult(
        text=text,
        points=tuple(scan.points),
        stated_count=stated,
        none_found=not scan.points and (stated == 0 or bool(_NONE.search(prose))),
        truncated=scan.cut,
        malformed=scan.malformed,
    )


# Quantifiers over more than one character class are bounded or possessive: no text is slow.
_TAG = r"<(?P<close>/?)(?P<kind>points?|tracks)(?=[\s/>])"
_NO_TAG = r"<(?!/?(?:points?|tracks)[\s/>])"
_START = re.compile(
    rf"(?i:{_TAG})|Click\((?=(?a:\s{{0,80}}[-+.\d]))(?P<click>[^()<]{{0,80}})(?P<end>\)|\Z)"
)
_NEXT_TAG = re.compile(_TAG, re.I)
_TAG_STARTS = ("<points", "<tracks", "</points", "</tracks")
_TOKEN = re.compile(
    rf"/?>|{_TAG}|(?P<name>(?a:\w[\w:.-]{{0,31}}))(?:\s*+=\s*+(?P<quote>[\"']?))?", re.I
)
_NUMBER_NAME = re.compile(r"(?P<axis>[xy])(?P<key>\d{0,6})|(?P<id>p|\d{1,6})", re.A)
_VALUES = {
    '"': re.compile(rf'(?:[^"<]++|{_NO_TAG})*+', re.I),
    "'": re.compile(rf"(?:[^'<]++|{_NO_TAG})*+", re.I),
    "": re.compile(rf"(?:[^\s<>/]++|/(?!>)|{_NO_TAG})*+", re.I),
}
_QUOTED_NUMBER = re.compile(r"[-+.,\d\s]{0,64}", re.A)
_UNQUOTED_NUMBER = re.compile(r"[-+.\d]{0,32}(?:,\s{0,4}[-+.\d]{0,32})?", re.A)
_FRAMES = re.compile(r"[-+.\d\s;:,]*", re.A)
_LAST_Y = re.compile(r"1000|(?!100)\d{3}", re.A)
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


class _Scan:
    """Everything a text says.

    `malformed` counts pairs that cannot be used and tags without any pair, `cut` is whether the
    text ends inside a tag or a pair, `prose` holds the text outside of tags.
    """

    def __init__(self, text: str) -> None:
        self.points: list[Point] = []
        self.malformed = 0
        self.cut = False
        self._text = text
        self._prose: list[str] = []
        self._halves: dict[tuple[str, int | None], float | None] = {}  # x or y without the other
        explicit = False  # a tag or a Click: bare pairs are mere prose
        at = 0
        while (start := _START.search(text, at)) and start["end"] != "":
            self._prose.append(text[at : start.start()])
            at = start.end()
            if start["close"]:
                at += text[at] == ">"
                continue
            explicit = True
            if start["kind"]:
                at = self._read_tag(at, timed=start["kind"].lower() == "tracks")
            else:
                self._add_percents(*start["click"].replace(",", " ", 1).split())
        self._prose.append(text[at:])
        self.prose = "".join(self._prose)
        self.cut |= start is not None or _partial_tag(text) != ""
        if not explicit:
            for pair in _BARE.finditer(self.prose):
                self._add_percents(*pair.groups())
            self.cut |= _BARE_CUT.search(self.prose, max(0, len(self.prose) - 20)) is not None

    def _add(self, x: float | None, y: float | None, id: int | None = None) -> None:
        if x is None or y is None:
            self.malformed += 1
        else:
            self.points.append(Point(x, y, id=id))

    def _add_percents(self, *numbers: str) -> None:
        x, y = map(_percent, numbers) if len(numbers) == 2 else (None, None)
        self._add(x, y)

    def _read_tag(self, at: int, *, timed: bool) -> int:
        """Read the attributes and the body of a tag; return where to go on."""
        text, first, malformed = self._text, len(self.points), self.malformed
        alt = label = None
        self._halves = {}
        while (token := _TOKEN.search(text, at)) and token["name"]:
            name, quote, at = token["name"].lower(), token["quote"], token.end()
            if quote is None:
                continue
            number = _NUMBER_NAME.fullmatch(name)
            if name == "coords":
                pattern = _FRAMES
            elif number:
                pattern = _QUOTED_NUMBER if quote else _UNQUOTED_NUMBER
            else:
                pattern = _VALUES[quote]
            match = pattern.match(text, at)
            assert match is not None  # it may be empty
            value, at = match[0], match.end()
            after = text[at : at + 1]
            at += after == quote != ""
            if name == "coords":
                self._read_frames(value, after, timed)
            elif number:
                self._read_number(number, value, after)
            elif name == "alt" and after not in ("", "<"):  # else its end is missing
                alt = _clean(value)
        if token is None:
            self.cut, at = True, len(text)
            self.malformed += list(self._halves.values()).count(None)
        else:
            at = token.start() if token["kind"] else token.end()
            self.malformed += len(self._halves)
            self.malformed += len(self.points) == first and self.malformed == malformed
        if token and token[0] == ">":
            label, at = self._read_body(at)
        self.points[first:] = [replace(p, label=label, alt=alt) for p in self.points[first:]]
        return at

    def _read_body(self, at: int) -> tuple[str | None, int]:
        """Read the text between two tags; the label is None if it is not closed."""
        end = _NEXT_TAG.search(self._text, at)
        partial = "" if end else _partial_tag(self._text)
        body = self._text[at : end.start() if end else None].removesuffix(partial)
        self.cut |= end is None
        if (end and end["close"]) or partial.startswith("</"):
            return _clean(body), at + len(body)
        self._prose.append(body)  # what follows a tag that is never closed
        return None, at + len(body)

    def _read_number(self, name: re.Match[str], value: str, after: str) -> None:
        # A missing closing quote is forgiven where the number plainly ends.
        ended = not after or after.isspace() or after in "\"'<>/" or value[-1:].isspace()
        if name["id"]:
            tenths = _TENTHS.fullmatch(value.strip()) if ended else None
            if tenths:
                self._add(int(tenths[1]) / 1000, int(tenths[2]) / 1000, _integer(name["id"]))
            elif after:
                self.malformed += 1
        elif after:  # the end of the text may have cut digits off
            axis, key = name["axis"], _integer(name["key"])
            other = "y" if axis == "x" else "x"
            number = _percent(value.strip(" \t\r\n,")) if ended else None
            if (other, key) in self._halves:
                pair = {axis: number, other: self._halves.pop((other, key))}
                self._add(pair["x"], pair["y"], key)
            else:
                self.malformed += (axis, key) in self._halves
                self._halves[axis, key] = number

    def _read_frames(self, value: str, after: str, timed: bool) -> None:
        frames = [frame.split() for frame in re.split(r"[;:,\t]", value)]
        if not after:  # cut off: of the last frame only the whole points count
            last = frames.pop()
            if last and not value[-1].isspace():
                # Its last number is complete only if it is a y that no further digit could follow.
                is_y = len(last) > 1 and len(last) % 3 == 1
                if not (is_y and _LAST_Y.fullmatch(last[-1])):
                    last.pop()
            if len(last) > 3:
                frames.append(last[: len(last) - (len(last) - 1) % 3])
        for numbers in filter(None, frames):
            self._read_frame(numbers, timed)

    def _read_frame(self, numbers: list[str], timed: bool) -> None:
        frame, *triples = numbers
        known = _FRAME.fullmatch(frame) is not None
        t = float(frame) if known and (timed or "." in frame) else None
        index = int(frame) - 1 if known and t is None and int(frame) > 0 else None
        # Numbers are padded to three digits. After a shorter one, in a frame whose numbers do not
        # add up, a number may be missing and all that follow have slipped.
        slipped, short = len(triples) % 3 > 0, False
        for name, *xy in zip(*[iter(triples)] * 3, strict=False):
            id, (x, y) = _integer(name), map(_integer, xy)
            if id is None or x is None or y is None or max(x, y) > 1000 or not known:
                self.malformed += 1
                continue
            short |= min(map(len, xy)) < 3
            if slipped and short:
                self.malformed += 1
            else:
                self.points.append(Point(x / 1000, y / 1000, id=id, image_index=index, t=t))
        self.malformed += slipped or not triples


def _partial_tag(text: str) -> str:
    """Return the first characters of a tag that the text ends in."""
    tail = text[max(0, text.rfind("<")) :][:9]
    begun = len(tail) > 2 and any(start.startswith(tail.lower()) for start in _TAG_STARTS)
    return tail if begun else ""


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
_NUMBER_WORDS = {word: number for number, word in enumerate(_ONES)}
for _tens, _word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2):
    _NUMBER_WORDS[_word] = 10 * _tens
    _NUMBER_WORDS |= {f"{_word} {_ONES[unit]}": 10 * _tens + unit for unit in range(1, 10)}
_WORDS = "|".join(sorted(_NUMBER_WORDS, key=len, reverse=True)).replace(" ", "[- ]")
# Digits with separators stand in groups of three; "12,34", "1.5" and "50%" are no counts.
_NUMBER = (
    r"(?:(?P<digits>\d{1,3}(?:[,_' \u00a0\u2009\u202f]\d{3}){1,3}|\d{1,12})(?![\d%]|[.,]\d)"
    rf"|(?P<word>{_WORDS})\b)"
)
_TOTAL = re.compile(rf"\btotal of\s{{1,4}}{_NUMBER}", re.I)
_THERE_ARE = re.compile(rf"\bthere (?:are|is)\s{{1,4}}{_NUMBER}", re.I)
_ALONE = re.compile(rf"{_NUMBER}\.?", re.I)
_NONE = re.compile(
    r"\bthere(?: is| are|'s) (?:none|no (?:such )?[^.!?]{1,80} in (?:the|this|that) )"
    r"|\bthere (?:are|is)(?: not|n't) any\b|\bthere are no\b|\bdo(?: not|n't) see any\b"
    r"|(?:\bnot|n't) (?:present |visible |shown |seen )?in (?:the|this|that) "
    r"(?:image|picture|photo|video|scene)"
    r"|\Anone\.?\Z|\Ano tracks available\b",
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
    return _NUMBER_WORDS[match["word"].lower().replace("-", " ")]


# Neighbours in the list differ strongly, so that neighbouring numbers can be told apart.
_COLOURS = (
    (255, 0, 110), (0, 220, 60), (60, 130, 255), (255, 190, 0),
    (190, 60, 255), (0, 215, 225), (255, 95, 30), (170, 225, 20),
)  # fmt: skip


def _draw(canvas: Image.Image, points: Mapping[int, Point]) -> None:
    """Draw a dot and a text with its number at each point: they show on any background."""
    width, height = canvas.size
    size = max(10, round(0.028 * min((width * height) ** 0.5, 2 * min(width, height))))
    line, radius = max(1, round(size * 0.1)), max(2, round(size * 0.25))
    reach = radius + 2 * line
    draw = ImageDraw.Draw(canvas)
    style: dict[str, Any] = {
        "font": ImageFont.load_default(size), "anchor": "lb", "stroke_width": 2 * line,
    }  # fmt: skip
    labels: set[str | None] = {None, ""}
    for number, point in points.items():
        text = str(number) if point.label in labels else f"{number} {point.label}"
        text = "".join(char if char.isprintable() else " " for char in text[:60])
        labels.add(point.label)
        column, row = point.px(canvas.size)
        _, top, right, _ = draw.textbbox((column + reach, row - reach), text, **style)
        x = column + reach - max(0, right - width)
        y = row - reach - min(0, top)
        draw.text((x, y), text, (255, 255, 255), stroke_fill=(0, 0, 0), **style)
    # After the texts, so that none hides a dot.
    for number, point in points.items():
        colour = _COLOURS[(number - 1) % len(_COLOURS)]
        column, row = point.px(canvas.size)
        for r, fill in ((reach, (0, 0, 0)), (radius + line, (255, 255, 255)), (radius, colour)):
            draw.ellipse((column - r, row - r, column + r, row + r), fill)
