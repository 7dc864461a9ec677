"""The benchmark on a terminal: progress with time left while it runs, a table at its end.

Progress goes to standard error, results to standard output, so that ``-o json`` can be piped.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, JustifyMethod
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from molmo_edge.bench import drift_run, tables
from molmo_edge.bench.compare import Comparison
from molmo_edge.bench.document import Document, Row
from molmo_edge.bench.drift import DriftDocument
from molmo_edge.bench.environment import software_line


class Watcher:
    """Shows where a run is. The time left is for the least number of iterations of all rows."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._rows_left, self._least = 0, 1
        self._began = self._row_began = time.monotonic()

    def __enter__(self) -> Watcher:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def starting(self, what: str) -> None:
        """Something without iterations goes on, building an engine for example."""
        self._replace(what, None)

    def scenario(self, title: str, rows: int) -> None:
        self._rows_left = rows
        self.console.print(f"[bold]{title}[/bold]", highlight=False)

    def row(self, title: str, least: int) -> None:
        self._least = least
        self._rows_left = max(self._rows_left - 1, 0)
        self._row_began = time.monotonic()
        self._replace(title, least)

    def iteration(self, row: Row, done: int) -> None:
        if self._task is None:
            return
        each = (time.monotonic() - self._row_began) / done
        ahead = max(self._least - done, 0) + self._rows_left * self._least
        last = row.samples[-1].output_tps if row.samples else None
        self._progress.update(
            self._task,
            completed=done,
            total=max(done, self._least),
            speed=f"{last:.1f} tok/s" if last else "",
            left=f"about {clock_text(each * ahead)} left" if ahead else "until narrow",
        )

    def row_done(self, row: Row) -> None:
        self.console.print(f"  {tables.remarks(row)[0]}", highlight=False, markup=False)

    def _replace(self, title: str, total: int | None) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(title, total=total, speed="", left="")


def show_comparison(found: Comparison, console: Console) -> None:
    """Print results side by side, and what is unlike about them."""
    table = Table()
    table.add_column("", no_wrap=True)
    for head in found.heads:
        table.add_column(head, justify="right", overflow="fold")
    for line in found.lines:
        table.add_row(*line)
    console.print(table)
    for flag in found.flags:
        console.print(f"not alike: {flag}", style="yellow", highlight=False, markup=False)


def show_drift(document: DriftDocument, console: Console) -> None:
    """Print what every configuration does to the answers."""
    console.print(software_line(document.environment), highlight=False, markup=False)
    if document.environment.model.random_weights:
        console.print(
            "random weights: this drift says nothing about a trained model", style="yellow"
        )
    for found in document.drifts:
        table = Table(title=f"{found.other} against {found.reference}", title_justify="left")
        heads, cells = drift_run.grid(found)
        for i, head in enumerate(heads):
            justify: JustifyMethod = "left" if i == 0 else "right"
            table.add_column(head, justify=justify, min_width=12 if i == 0 else None)
        for line in cells:
            table.add_row(*line)
        console.print(table)
        style = "green" if found.passed else "red"
        console.print(drift_run.verdict(found, document), style=style, markup=False)
    console.print(drift_run.LEGEND, style="dim", highlight=False, markup=False)


def clock_text(seconds: float) -> str:
    """Seconds as m:ss."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def show(document: Document, console: Console) -> None:
    """Print a result's head, tables and remarks."""
    for name, text in tables.head(document):
        console.print(f"{name:>14}  {text}", highlight=False, markup=False, soft_wrap=True)
    for note in document.notes:
        console.print(f"{'note':>14}  {note}", style="yellow", highlight=False, markup=False)
    for scenario in document.scenarios:
        console.print()
        if scenario.error:
            console.print(f"{scenario.title}: {scenario.error}", style="red", markup=False)
        if not scenario.rows:
            continue
        narrow = console.width < 120
        caption = "speeds in tok/s, steady state where there is one" if narrow else None
        table = Table(title=scenario.title, title_justify="left", caption=caption)
        heads, cells = tables.grid(scenario, narrow=narrow)
        for i, head in enumerate(heads):
            justify: JustifyMethod = "left" if i == 0 else "right"
            table.add_column(head, justify=justify, overflow="fold", no_wrap=i > 0)
        for line in cells:
            table.add_row(*line)
        console.print(table)
        for row in scenario.rows:
            for remark in tables.remarks(row)[0 if row.error else 1 :]:
                console.print(f"  {remark}", highlight=False, markup=False)
