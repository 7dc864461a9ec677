"""Reads the point tags of an answer while it is being written, in one pass.

Every character is read a bounded number of times; text that may still change its meaning (at
most about a hundred characters) waits for the next piece, so a split never changes the outcome.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from molmo_edge.points_forms import Found, Frames, clean, percent, tenths, whole

# All quantifiers over more than one character class are bounded: no input makes them slow.
_TAG = re.compile(r"<(/?)(points?|tracks)(?=[\s/>])", re.I)
_TAG_STARTS = ("<points", "<tracks", "</points", "</tracks")
_START = re.compile(r"<|Click(?:\(|\Z)|C(?:l(?:ic?)?)?\Z")
_CLICK = re.compile(r"Click\(([^()<]{0,80})(\)|\Z)")
_NUMERIC = re.compile(r"\s{0,80}[-+.\d]", re.A)
_BARE = re.compile(
    r"\(\s{0,4}([-+]?\d{1,24}+\.\d{1,24}+)(?:\s{0,4},\s{0,4}|\s{1,4})"
    r"([-+]?\d{1,24}+\.\d{1,24}+)\s{0,4}\)",
    re.A,
)
_BARE_CUT = re.compile(r"\(\s?\d{1,3}\.[\d\s,.]{0,12}\Z", re.A)
_SPACE = re.compile(r"\s*")
_NEXT = re.compile(r"/>|/\Z|[<>]|\w", re.A)
_NAME = re.compile(r"[\w:.-]{1,32}", re.A)
_NUMBER_NAME = re.compile(r"[xy]?\d{0,6}|p", re.A)
_QUOTED_RUN = re.compile(r"[-+.,\d\s]{0,64}", re.A)
_PLAIN_RUN = re.compile(r"[-+.\d]{0,32}(?:,\s{0,4}[-+.\d]{0,32})?", re.A)
_COORD = re.compile(r"[ \n\r\f\v]+|[;:,\t]|[-+.\d]{1,16}", re.A)
_LAST_Y = re.compile(r"1000|(?!100)\d{3}", re.A)
_STRING_END = {
    '"': re.compile(r'["<]'),
    "'": re.compile(r"['<]"),
    "": re.compile(r"[\s<>]|/>|/\Z"),
}


class Scanner:
    """Feed it text piece by piece, then ``close`` it.

    Attributes:
        found: the usable pairs so far, in the order in which they became complete.
        malformed: pairs that cannot be used, and tags without any pair.
        cut: the text ends inside a tag or a pair. Known after ``close``.
        prose: the text outside of tags. Known after ``close``.
    """

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.malformed = 0
        self.cut = False
        self.prose = ""
        self._outside: list[str] = []
        self._buf, self._pos, self._final = "", 0, False
        self._state: Callable[[], bool] = self._in_text
        self._explicit = False  # a tag or a Click was there: bare pairs are mere prose
        self._open("")

    def _open(self, name: str) -> None:
        self._frames = Frames(timed=name == "tracks")
        self._first, self._any = len(self.found), False
        self._half: dict[int | None, tuple[str, float | None]] = {}
        self._string: list[str] = []
        self._name, self._quote = "", ""
        self._label: str | None = None
        self._alt: str | None = None

    def feed(self, text: str) -> None:
        """Read one more piece."""
        self._buf, self._pos = self._buf[self._pos :] + text, 0
        while self._state():
            pass

    def close(self) -> None:
        """Read what was waiting for more text."""
        self._final = True
        self.feed("")
        if self._state != self._in_text:
            self.cut = True
            if self._state == self._in_body:
                self._outside += self._string
            else:
                self._end_attributes(cut=True)
            self._end_tag()
        self.prose = "".join(self._outside)
        if not self._explicit:
            for match in _BARE.finditer(self.prose):
                self._pair(percent(match[1]), percent(match[2]))
            self.cut |= _BARE_CUT.search(self.prose, max(0, len(self.prose) - 20)) is not None

    # Each state reads on from _pos and says whether to go on; False waits for more text.

    def _in_text(self) -> bool:
        match = _START.search(self._buf, self._pos)
        end = match.start() if match else len(self._buf)
        self._outside.append(self._buf[self._pos : end])
        self._pos = end
        if match is None:
            return False
        if match[0] != "<":
            return self._click(match[0])
        tag = self._tag()
        if isinstance(tag, bool):
            return self._no_tag(tag, self._outside)
        self._pos = tag.end()
        if tag[1]:
            self._pos += self._buf[self._pos] == ">"
            return True
        self._explicit = True
        self._open(tag[2].lower())
        return self._go(self._in_tag)

    def _click(self, start: str) -> bool:
        match = _CLICK.match(self._buf, self._pos)
        open_end = match is not None and not match[2]
        if (start != "Click(" or open_end) and not self._final:
            return False
        if match is None or open_end or not _NUMERIC.match(match[1]):
            self.cut |= match is not None and open_end and bool(_NUMERIC.match(match[1]))
            self._outside.append(start)
            self._pos += len(start)
            return True
        self._explicit = True
        self._pos = match.end()
        parts = match[1].replace(",", " ", 1).split()
        x, y = map(percent, parts) if len(parts) == 2 else (None, None)
        self._pair(x, y)
        return True

    def _in_tag(self) -> bool:
        match = _NEXT.search(self._buf, self._pos)
        self._pos = match.start() if match else len(self._buf)
        if match is None or match[0] == "/":
            return False
        if match[0] == "<":
            tag = self._tag()
            if isinstance(tag, bool):
                return self._no_tag(tag, [])
            self._end_attributes()  # its ">" is missing: the next tag begins
            return self._end_tag()
        if match[0] in (">", "/>"):
            self._pos = match.end()
            self._end_attributes()
            self._string = []
            return self._go(self._in_body) if match[0] == ">" else self._end_tag()
        name = _NAME.match(self._buf, self._pos)
        assert name is not None
        if name.end() == len(self._buf) and len(name[0]) < 32 and not self._final:
            return False
        self._name, self._pos = name[0].lower(), name.end()
        return self._go(self._after_name)

    def _after_name(self) -> bool:
        char = self._skip_space()
        self._pos += char == "="
        return char != "" and self._go(self._before_value if char == "=" else self._in_tag)

    def _before_value(self) -> bool:
        char = self._skip_space()
        self._quote = char if char in "\"'" else ""
        self._pos += len(self._quote)
        self._string = []
        state = self._in_coords if self._name == "coords" else self._in_string
        return char != "" and self._go(
            self._in_number if _NUMBER_NAME.fullmatch(self._name) else state
        )

    def _in_number(self) -> bool:
        match = (_QUOTED_RUN if self._quote else _PLAIN_RUN).match(self._buf, self._pos)
        assert match is not None
        run, after = match[0], self._buf[match.end() : match.end() + 1]
        if not after and not self._final:
            return False
        self._pos = match.end() + (after != "" and after == self._quote)
        self._state = self._in_tag
        pair = tenths(run.strip())
        # A missing closing quote is forgiven where the number plainly ends.
        ended = (after != "" and after in "\"'<>/") or after.isspace() or run[-1:].isspace()
        if self._name[0] in "xy":
            if after:  # the end of the text may have cut digits off
                self._coordinate(percent(run.strip(" \t\r\n,")) if ended else None)
        elif pair and (ended or not after):
            self._pair(*pair, whole(self._name))
        elif after:
            self._pair(None, None)
        return True

    def _in_coords(self) -> bool:
        match = _COORD.match(self._buf, self._pos)
        if match is None:
            char = self._buf[self._pos : self._pos + 1]
            if char or self._final:
                self._take(self._frames.end(cut=not char))
                self.malformed += self._frames.malformed
                self._any |= self._frames.malformed > 0
            self._pos += char != "" and char == self._quote
            return char != "" and self._go(self._in_tag)
        token = match[0]
        if token[0] in ";:,\t":
            self._take(self._frames.end())
        elif not token.isspace():
            if match.end() == len(self._buf) and len(token) < 16:
                if not self._final:
                    return False
                # Of a cut-off pair, only a y that no further digit could follow is complete.
                if not (self._frames.awaits_y and _LAST_Y.fullmatch(token)):
                    token = ""
            if token:
                self._take(self._frames.number(token))
        self._pos = match.end()
        return True

    def _in_string(self) -> bool:
        match = _STRING_END[self._quote].search(self._buf, self._pos)
        end = match.start() if match else len(self._buf)
        self._string.append(self._buf[self._pos : end])
        self._pos = end
        if match is None or match[0] == "/":
            return False
        if match[0] == "<":
            tag = self._tag()
            # A tag inside a value: the closing quote is missing, so the value is unknown.
            return (
                self._no_tag(tag, self._string) if isinstance(tag, bool) else self._go(self._in_tag)
            )
        self._pos += len(self._quote)
        if self._name == "alt":
            self._alt = clean("".join(self._string))
        return self._go(self._in_tag)

    def _in_body(self) -> bool:
        end = self._buf.find("<", self._pos)
        end = len(self._buf) if end < 0 else end
        self._string.append(self._buf[self._pos : end])
        self._pos = end
        if end == len(self._buf):
            return False
        tag = self._tag()
        cut = tag is True and self._final and self._buf.startswith("</", end)
        if isinstance(tag, bool) and not (cut and len(self._buf) - end > 2):
            return self._no_tag(tag, self._string)
        if cut or (not isinstance(tag, bool) and tag[1]):
            self._label = clean("".join(self._string))
        else:  # another tag begins, this one was never closed: what follows it is prose
            self._outside += self._string
        return self._end_tag()

    # The pieces the states share.

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _skip_space(self) -> str:
        match = _SPACE.match(self._buf, self._pos)
        assert match is not None
        self._pos = match.end()
        return self._buf[self._pos : self._pos + 1]

    def _tag(self) -> re.Match[str] | bool:
        """The tag at _pos; else whether more text could make it one."""
        rest = self._buf[self._pos : self._pos + 9].lower()
        return _TAG.match(self._buf, self._pos) or any(s.startswith(rest) for s in _TAG_STARTS)

    def _no_tag(self, later: bool, sink: list[str]) -> bool:
        if later and not self._final:
            return False
        end = len(self._buf) if later else self._pos + 1
        self.cut |= end - self._pos > 2
        sink.append(self._buf[self._pos : end])
        self._pos = end
        return True

    def _pair(self, x: float | None, y: float | None, id: int | None = None) -> None:
        self._any = True
        if x is None or y is None:
            self.malformed += 1
        else:
            self._take([Found(x, y, id)])

    def _take(self, pairs: list[Found]) -> None:
        self._any |= bool(pairs)
        for found in pairs:
            found.alt = self._alt  # if it is known by now; _end_tag sets it in any case
        self.found += pairs

    def _coordinate(self, value: float | None) -> None:
        axis, key = self._name[0], whole(self._name[1:])
        other = self._half.pop(key, None)
        if other is None or other[0] == axis:
            self.malformed += other is not None
            self._half[key] = (axis, value)
        elif axis == "y":
            self._pair(other[1], value, key)
        else:
            self._pair(value, other[1], key)

    def _end_attributes(self, *, cut: bool = False) -> None:
        halves = [value for _, value in self._half.values()]
        self.malformed += halves.count(None) if cut else len(halves)
        self.malformed += not (cut or halves or self._any)

    def _end_tag(self) -> bool:
        for found in self.found[self._first :]:
            found.label, found.alt = self._label, self._alt
        self._open("")
        return self._go(self._in_text)
