"""Headings, lists and tables, and their three renderings: terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from rich.console import Console
from rich.table import Table as RichTable

from molmo_edge.bench.document import Summary

UNKNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's own."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Items:
    """Lines of a list."""

    lines: Sequence[str]
    style: Literal["plain", "warning"] = "plain"


@dataclass(frozen=True)
class Table:
    """A table of text cells; ``details`` is the summary under which HTML folds it."""

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    details: str = ""

    def known(self, keep: int = 1) -> Table:
        """Without columns in which nothing is known, the first ``keep`` apart."""
        used = [
            i
            for i in range(len(self.heads))
            if i < keep or any(line[i] != UNKNOWN for line in self.lines)
        ]
        lines = [[line[i] for i in used] for line in self.lines]
        return Table([self.heads[i] for i in used], lines, self.details)


@dataclass(frozen=True)
class Quote:
    """A long text under a summary, for HTML alone."""

    summary: str
    text: str


Block = Heading | Items | Table | Quote


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    """A number for people, or a dash."""
    return UNKNOWN if value is None else f"{value * scale:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A fraction as a percentage, or a dash."""
    return UNKNOWN if value is None else f"{value:.{digits}%}"


def interval(summary: Summary, digits: int = 1) -> str:
    """Mean with its interval."""
    if summary.ci_low is None:
        return number(summary.mean, digits)
    low, high = number(summary.ci_low, digits), number(summary.ci_high, digits)
    return f"{number(summary.mean, digits)} [{low}, {high}]"


def markdown(blocks: Iterable[Block]) -> str:
    """The blocks as Markdown."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Items):
            parts.append("\n".join(f"- {line}" for line in block.lines))
        elif isinstance(block, Table):
            rows = [block.heads, ["---"] * len(block.heads), *block.lines]
            parts.append("\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows))
    return "\n\n".join(filter(None, parts)) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def html(blocks: Iterable[Block]) -> str:
    """The blocks as HTML, every text escaped: a model's answer may hold anything."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h{block.level}>{escape(block.text)}</h{block.level}>")
        elif isinstance(block, Items):
            lines = "".join(f"<li>{escape(line)}</li>" for line in block.lines)
            parts.append(f'<ul class="{block.style}">{lines}</ul>' if lines else "")
        elif isinstance(block, Table):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in block.heads)
            rows = "".join(
                f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>\n"
                for line in block.lines
            )
            table = (
                f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
                f"<tbody>\n{rows}</tbody></table></div>"
            )
            parts.append(_fold(block.details, table) if block.details else table)
        else:
            parts.append(_fold(block.summary, f"<blockquote>{escape(block.text)}</blockquote>"))
    return "\n".join(parts)


def _fold(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def show(blocks: Iterable[Block], console: Console) -> None:
    """Print the blocks on a terminal, without what HTML folds."""
    for block in blocks:
        if isinstance(block, Heading):
            console.print(f"\n{block.text}", style="bold", highlight=False, markup=False)
        elif isinstance(block, Items):
            style = "yellow" if block.style == "warning" else None
            for line in block.lines:
                console.print(
                    f"  {line}", style=style, highlight=False, markup=False, soft_wrap=True
                )
        elif isinstance(block, Table) and not block.details:
            table = RichTable()
            for i, head in enumerate(block.heads):
                table.add_column(head, justify="right" if i else "left", overflow="fold")
            for cells in block.lines:
                table.add_row(*cells)
            console.print(table, markup=False)
