"""Where a benchmark run is, on a terminal: one status line, and a line for each finished row."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

from molmo_edge.bench.document import Row
from molmo_edge.bench.measure import Progress
from molmo_edge.bench.report import remarks


class TerminalProgress(Progress):
    """A context manager. The time left is for the minimum number of iterations of all rows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._rows_left, self._minimum, self._title = 0, 1, ""
        self._row_began = time.monotonic()

    def __enter__(self) -> TerminalProgress:
        self._status.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._status.stop()

    def starting(self, text: str) -> None:
        self._status.update(text)

    def scenario(self, title: str, rows: int) -> None:
        self._rows_left = rows
        self._console.print(title, style="bold", highlight=False, markup=False)

    def row(self, title: str, minimum: int) -> None:
        self._title, self._minimum = title, minimum
        self._rows_left = max(self._rows_left - 1, 0)
        self._row_began = time.monotonic()
        self._status.update(title)

    def iteration(self, row: Row, done: int) -> None:
        ahead = max(self._minimum - done, 0) + self._rows_left * self._minimum
        seconds = round((time.monotonic() - self._row_began) / done * ahead)
        left = f"about {seconds // 60}:{seconds % 60:02d} left" if ahead else "until narrow"
        speed = row.samples[-1].output_tps if row.samples else None
        speed_text = f", {speed:.1f} tok/s" if speed else ""
        self._status.update(f"{self._title}: {done} of {self._minimum}{speed_text}, {left}")

    def row_done(self, row: Row) -> None:
        self._console.print(f"  {remarks(row)[0]}", highlight=False, markup=False)
