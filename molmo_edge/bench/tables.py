"""Markdown, which every page is written in: rich prints it, markdown-it makes HTML of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import JustifyMethod
from rich.markdown import Markdown, TableDataElement

from molmo_edge.bench.document import Summary

UNKNOWN = "\N{EN DASH}"


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    """A number for people, or a dash."""
    return UNKNOWN if value is None else f"{value * scale:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A fraction as a percentage, or a dash."""
    return UNKNOWN if value is None else f"{value:.{digits}%}"


def interval(summary: Summary) -> str:
    """Mean with its interval."""
    if summary.ci_low is None:
        return number(summary.mean)
    return f"{number(summary.mean)} [{number(summary.ci_low)}, {number(summary.ci_high)}]"


def escape(text: str) -> str:
    """Text on one line, none of which Markdown takes for markup."""
    return re.sub(r"([\\`*<|])", r"\\\1", " ".join(text.split()))


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], *, keep: int = 1) -> str:
    """A table without the columns in which nothing is known, the first ``keep`` apart."""
    columns = [
        column
        for i, column in enumerate(zip(heads, *lines, strict=True))
        if i < keep or any(cell != UNKNOWN for cell in column[1:])
    ]
    head, *rows = zip(*columns, strict=True)
    rule = ("---", *["---:"] * (len(head) - 1))
    cells = [map(escape, head), rule, *(map(escape, row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def warnings(lines: Iterable[str]) -> str:
    """A list that stands out."""
    return "\n".join(f"> - {escape(line)}" for line in lines)


def page(parts: Iterable[str]) -> str:
    """The parts as one Markdown text, empty ones left out."""
    return "\n\n".join(filter(None, parts)) + "\n"


class _Cell(TableDataElement):
    """A cell that is folded where it is too narrow; rich's own cut a number off."""

    def __init__(self, justify: JustifyMethod) -> None:
        super().__init__(justify)
        self.content.overflow = "fold"


class Page(Markdown):
    """A page that rich prints on a terminal."""

    elements: ClassVar = {**Markdown.elements, "td_open": _Cell}


def html(markdown: str) -> str:
    """A page as HTML. A model's answer may hold anything: no markup of its own, links or images."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    return str(parser.disable(["link", "image", "autolink", "reference"]).render(markdown))
