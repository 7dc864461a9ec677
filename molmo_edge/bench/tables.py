"""A result document as rows of text: the terminal's table, and Markdown.

This module knows nothing about measuring; it shows what a document says and a dash for unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.bench.document import Document, Row, Scenario, Summary
from molmo_edge.bench.environment import software_line

Cell = Callable[[Row], str]

UNKNOWN = "\N{EN DASH}"

STOPS = {
    "narrow": "interval narrow enough",
    "cap": "largest number of iterations",
    "time": "time limit",
    "short": "time limit, before its least number of iterations",
    "fixed": "its fixed number",
    "interrupted": "an interruption",
    "error": "a failure",
    None: "nothing, it goes on",
}


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    """A number for people, or a dash."""
    return UNKNOWN if value is None else f"{value * scale:.{digits}f}"


def part(row: Row) -> dict[str, Summary]:
    """The steady summaries, or all of them where the row never settled."""
    return row.steady or row.all


def interval(summary: Summary | None, digits: int = 1) -> str:
    """Mean with its interval."""
    if summary is None or summary.mean is None:
        return UNKNOWN
    if summary.ci_low is None or summary.ci_high is None:
        return number(summary.mean, digits)
    low, high = number(summary.ci_low, digits), number(summary.ci_high, digits)
    return f"{number(summary.mean, digits)} [{low}, {high}]"


def steady_from(row: Row) -> str:
    """Which iterations were warm-up."""
    if row.warmup is None or "disk_caches" in row.conditions:
        return UNKNOWN
    if row.warmup.start is None:
        return "not steady"
    slowed = ", slowed" if row.warmup.slowed else ""
    return f"from {row.warmup.start + 1}{slowed}"


def caches(row: Row) -> str:
    """What the row claims about caches, and whether the engine's counter bears it out."""
    if row.caches is None:
        return UNKNOWN
    told = {True: "", False: " (refuted)", None: " (unproved)"}[row.caches.proved]
    return row.caches.mode + told


def _of(
    name: str, value: Callable[[Summary], float | None], digits: int, scale: float = 1.0
) -> Cell:
    def cell(row: Row) -> str:
        summary = part(row).get(name)
        return UNKNOWN if summary is None else number(value(summary), digits, scale)

    return cell


def _mean(name: str) -> Cell:
    return _of(name, lambda summary: summary.mean, 1)


def _speed(name: str) -> Cell:
    def cell(row: Row) -> str:
        return interval(part(row).get(name))

    return cell


@dataclass(frozen=True)
class Column:
    """Head and cell; ``narrow`` is the same for a narrow terminal, ``None`` to leave it out."""

    head: str
    cell: Cell
    narrow: tuple[str, Cell] | None


def _both(head: str, cell: Cell, short: str | None = None) -> Column:
    return Column(head, cell, (short or head, cell))


def _wide(head: str, cell: Cell) -> Column:
    return Column(head, cell, None)


COLUMNS = (
    _both("case", lambda row: row.title),
    _both("n", lambda row: str(len(row.waves) or len(row.samples) or UNKNOWN)),
    _both("steady", lambda row: steady_from(row)),
    _both("since due s", lambda row: _since_due(row), "due s"),
    _wide("preproc ms", _of("preprocess_s", lambda s: s.median, 0, 1000)),
    _both("ttft ms", _of("ttft_s", lambda s: s.median, 0, 1000)),
    _wide("ttft p99", _of("ttft_s", lambda s: s.p99, 0, 1000)),
    _wide("itl ms", _of("itl_s", lambda s: s.p50, 2, 1000)),
    _wide("itl p99", _of("itl_s", lambda s: s.p99, 2, 1000)),
    Column("decode tok/s", _speed("output_tps"), ("decode", _mean("output_tps"))),
    Column("request tok/s", _speed("request_tps"), ("request", _mean("request_tps"))),
    Column(
        "total tok/s",
        lambda row: _total(row, _speed("total_tps")),
        ("total", lambda row: _total(row, _mean("total_tps"))),
    ),
    _both("of bandwidth", lambda row: _share(row), "of BW"),
    _both("J/token", lambda row: number(row.ceiling.joules_per_token if row.ceiling else None, 3)),
    _both("caches", lambda row: caches(row)),
)
"""The steady state's where there is one; latencies are medians, speeds means with interval.

"since due" is from when a frame existed, a request was due, or a process was started.
"""

DUE = ("fps", "rate", "disk_caches")


def _since_due(row: Row) -> str:
    walls = [s.wall_s for s in row.samples if s.wall_s is not None and s.error is None]
    if not walls or not row.conditions.keys() & set(DUE):
        return UNKNOWN
    return number(float(np.median(walls)), 2)


def _total(row: Row, cell: Cell) -> str:
    told = cell(row)
    return told if told != UNKNOWN else number(row.counts.get("total_tps"))


def _share(row: Row) -> str:
    share = row.ceiling.bandwidth_share if row.ceiling else None
    return UNKNOWN if share is None else f"{share:.0%}"


def grid(scenario: Scenario, *, narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of a scenario, without columns in which nothing is known."""
    wide = [(column.head, column.cell) for column in COLUMNS]
    columns = [column.narrow for column in COLUMNS if column.narrow] if narrow else wide
    cells = [[cell(row) for _, cell in columns] for row in scenario.rows]
    kept = [i for i in range(len(columns)) if i < 3 or any(line[i] != UNKNOWN for line in cells)]
    return [columns[i][0] for i in kept], [[line[i] for i in kept] for line in cells]


def remarks(row: Row) -> list[str]:
    """Sentences about one row that a table has no room for."""
    said = [f"{row.title}: ended by {STOPS[row.stopped]}" + (f", {row.error}" if row.error else "")]
    failed = row.counts.get("failed")
    if failed:
        said.append(f"{row.title}: {failed:.0f} of {len(row.samples)} requests failed")
    if row.counts.get("offered") is not None:
        offered, dropped = row.counts["offered"] or 0, row.counts.get("dropped") or 0
        said.append(f"{row.title}: {dropped:.0f} of {offered:.0f} frames dropped")
    if row.answer is not None and row.answer.matched is not None:
        wanted = len(row.answer.expected)
        said.append(f"{row.title}: {row.answer.matched} of {wanted} known values in the answer")
    return said


def head(document: Document) -> list[tuple[str, str]]:
    """What, on what, with what: the lines every printed result starts with."""
    model, device = document.environment.model, document.environment.device
    weights = " (random weights: the answers mean nothing)" if model.random_weights else ""
    lines = [
        ("model", f"{model.name or UNKNOWN}{weights}"),
        ("device", device.name or UNKNOWN),
        ("precision", f"{model.precision or UNKNOWN}, KV cache {model.kv_cache_dtype or UNKNOWN}"),
        ("software", software_line(document.environment)),
        ("power mode", device.power_mode or "unknown"),
        ("measured", document.created + ("" if document.complete else ", INCOMPLETE")),
    ]
    if document.source:
        lines.append(("source", document.source))
    if document.startup is not None:
        stages = document.startup.stages
        cold = ", ".join(f"{k} {number(v)} s" for k, v in stages.items() if v is not None)
        first = document.startup.first_request
        lines.append(("cold start", cold or UNKNOWN))
        if first is not None:
            told = f"ttft {number(first.ttft_s, 2)} s, whole {number(first.e2e_s, 2)} s"
            lines.append(("first request", first.error or told))
    return lines


def markdown(document: Document) -> str:
    """The whole result as one Markdown page."""
    out = [f"# Benchmark {document.label or document.environment.model.name or ''}".rstrip(), ""]
    out += [f"- **{name}**: {text}" for name, text in head(document)]
    out += [f"- **note**: {note}" for note in document.notes]
    for scenario in document.scenarios:
        out += ["", f"## {scenario.title}", ""]
        if scenario.error:
            out += [f"Not complete: {scenario.error}", ""]
        if not scenario.rows:
            continue
        heads, cells = grid(scenario)
        out += [markdown_table(heads, cells), ""]
        out += [f"- {remark}" for row in scenario.rows for remark in remarks(row)]
        heads, lines = phases(scenario)
        out += ["", markdown_table(heads, lines)] if lines else []
    if document.rules:
        out += ["", "## Rules", ""] + [f"- {name}: {rule}" for name, rule in document.rules.items()]
    return "\n".join(out).rstrip() + "\n"


def phases(scenario: Scenario) -> tuple[list[str], list[list[str]]]:
    """Cold and steady apart, in full, for the speeds and the time to first token."""
    lines: list[list[str]] = []
    for row in scenario.rows:
        for phase, summaries in (("warm-up", row.cold), ("steady", row.steady), ("all", row.all)):
            if phase == "all" and row.steady:
                continue
            for name in ("output_tps", "request_tps", "total_tps", "ttft_s"):
                if name in summaries:
                    s = summaries[name]
                    values = (s.mean, s.median, s.std, s.min, s.max, s.p90, s.p99)
                    digits = 3 if name.endswith("_s") else 1
                    count = UNKNOWN if s.n is None else str(s.n)
                    cells = [row.title, phase, name, count, *(number(v, digits) for v in values)]
                    lines.append(cells)
    heads = ["case", "phase", "metric", "n", "mean", "median (p50)", "std", "min", "max"]
    heads += ["p90", "p99"]
    return heads, lines


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, without a line end after its last line."""
    return "\n".join(map(_line, [heads, ["---"] * len(heads), *lines]))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
