"""How the forms of an answer write a place in a picture, and how each is read as 0 to 1.

* percent, 0-100: ``x="61.5" y="40.4"``, ``x1= y1=``, ``Click(61.5, 40.4)``, ``(61.5, 40.4)``
* tenths of a percent, exactly three digits each: ``p=123,456``, ``1=123,456``
* thousandths, 0-1000: ``coords="frame id x y id x y;frame …"``

A number outside its form's scale is never tried on another.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

_PERCENT = re.compile(r"\d{1,9}(?:\.\d{0,20})?|\.\d{1,20}", re.A)
_TENTHS = re.compile(r"(\d{3})\s{0,8},\s{0,8}(\d{3})", re.A)
_FRAME = re.compile(r"\d{1,9}(?:\.\d{0,6})?", re.A)
# With bounds and a semicolon: html.unescape alone raises on thousands of digits and reads
# "R&notes" as "R¬es".
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});", re.A)


@dataclass(slots=True)
class Found:
    """One usable pair, x and y from 0 to 1. Its label and alt are final when its tag has ended."""

    x: float
    y: float
    id: int | None = None
    image_index: int | None = None
    t: float | None = None
    label: str | None = None
    alt: str | None = None


def percent(text: str) -> float | None:
    """A number from 0 to 100 as 0 to 1, None if it is anything else."""
    # Shifted in decimal: 40.4 / 100 is 0.40399999999999997, and so below its pixel's edge.
    value = float(text + "e-2") if _PERCENT.fullmatch(text) else None
    return value if value is not None and value <= 1 else None


def tenths(text: str) -> tuple[float, float] | None:
    """A pair like "123,456" as (0.123, 0.456), None if it is anything else."""
    match = _TENTHS.fullmatch(text)
    return (int(match[1]) / 1000, int(match[2]) / 1000) if match else None


def whole(text: str) -> int | None:
    """A whole number of at most nine ASCII digits, else None."""
    return int(text) if len(text) <= 9 and text.isascii() and text.isdecimal() else None


def clean(text: str) -> str:
    """A label without HTML entities and outer blanks."""
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text).strip()


class Frames:
    """The numbers of one ``coords`` value, one by one.

    Attributes:
        malformed: triples that cannot be used, and frames whose numbers do not add up.
    """

    def __init__(self, *, timed: bool) -> None:
        self.malformed = 0
        self._timed = timed  # <tracks>: a frame is a time in seconds even without a decimal point
        self._numbers: list[str] = []  # the frame, then an unfinished id, x, y
        self._triples = 0
        self._short: list[Found] = []

    @property
    def awaits_y(self) -> bool:
        """Whether the next number completes a triple."""
        return len(self._numbers) == 3

    def number(self, token: str) -> list[Found]:
        """Take one number; return the pair it completes, if it is certain by now."""
        self._numbers.append(token)
        if len(self._numbers) < 4:
            return []
        frame, name, *xy = self._numbers
        del self._numbers[1:]
        self._triples += 1
        id, (x, y) = whole(name), map(whole, xy)
        if id is None or x is None or y is None or max(x, y) > 1000 or not _FRAME.fullmatch(frame):
            self.malformed += 1
            return []
        found = Found(x / 1000, y / 1000, id)
        if self._timed or "." in frame:
            found.t = float(frame)
        elif int(frame) > 0:
            found.image_index = int(frame) - 1
        # The form pads to three digits. A shorter number may mean that one is missing and all
        # have slipped: such a pair waits until the frame's numbers are known to add up.
        if self._short or min(map(len, xy)) < 3:
            self._short.append(found)
            return []
        return [found]

    def end(self, *, cut: bool = False) -> list[Found]:
        """The frame is over, or the text is (``cut``); return the pairs that waited for it."""
        slipped = len(self._numbers) > 1 and not cut
        self.malformed += slipped or (bool(self._numbers) and not self._triples and not cut)
        self.malformed += len(self._short) if slipped else 0
        waited = [] if slipped else self._short
        self._numbers, self._short, self._triples = [], [], 0
        return waited
