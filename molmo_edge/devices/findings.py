"""One thing a doctor found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warn", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        level: "ok"; "note": good to know; "warn": works, but worse than it could; "problem":
            will not work.
        what: the subject, a few words.
        detail: what is so.
        todo: what to do about it, empty where nothing is to be done.
    """

    level: Level
    what: str
    detail: str
    todo: str = ""
