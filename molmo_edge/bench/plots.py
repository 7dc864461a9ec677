"""Pictures of results, drawn with matplotlib (extra ``plot``), as SVG text or PNG files.

Each function takes documents and gives a figure, or ``None`` where the documents hold nothing of
the kind. This module knows nothing about pages; ``report`` puts the pictures on one.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from molmo_edge.bench.compare import head_names, overall_speed
from molmo_edge.bench.document import Document, Row
from molmo_edge.bench.store import write_bytes
from molmo_edge.bench.tables import part
from molmo_edge.errors import MissingDependencyError

WIDTH, HEIGHT = 5.4, 3.5  # inches; small, so that text stays readable on a phone
COLOURS = ("#3465a4", "#d35400", "#2e8b57", "#8e44ad", "#7f8c8d", "#b8860b", "#c0392b", "#16a085")

Figure = Any


def require_matplotlib() -> None:
    """Check for the extra before anything is drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as exc:
        raise MissingDependencyError(
            "plots need matplotlib; install molmo-edge[plot]", name="matplotlib"
        ) from exc


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _rows(documents: Sequence[Document], *names: str) -> Iterator[tuple[int, Row, str]]:
    """(document's index, row, label), the label saying no more than is needed."""
    heads = head_names(documents)
    all_chosen = [
        [s for s in document.scenarios if s.name in names and any(r.samples for r in s.rows)]
        for document in documents
    ]
    alone = sum(map(bool, all_chosen)) == 1
    for number, chosen in enumerate(all_chosen):
        for scenario in chosen:
            for row in scenario.rows:
                label = row.title if alone else f"{heads[number]}: {row.title}"
                yield number, row, label if len(chosen) == 1 else f"{label} ({scenario.name})"


ALONE = ("report", "latency", "text", "repeat-frame")


def speed(documents: Sequence[Document]) -> Figure | None:
    """Decode speed by iteration; hollow points are warm-up by the change-point rule."""
    figure, axes = _axes("Decode speed by iteration", "iteration", "tok/s")
    colours = iter(COLOURS * 9)
    drawn = False
    for _, row, label in _rows(documents, *ALONE):
        points = [(s.iteration + 1, s.output_tps) for s in row.samples if s.output_tps]
        if not points:
            continue
        drawn, colour = True, next(colours)
        start = row.warmup.start if row.warmup else None
        axes.plot(*zip(*points, strict=True), color=colour, lw=1.2, label=label)
        for settled in (False, True):
            some = [p for p in points if (start is not None and p[0] > start) is settled]
            if some:
                face = colour if settled else "white"
                axes.plot(*zip(*some, strict=True), "o", ms=5, mfc=face, mec=colour)
        if start:
            axes.axvline(start + 0.5, color=colour, lw=0.8, ls=":")
    if not drawn:
        return None
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def latencies(documents: Sequence[Document]) -> Figure | None:
    """Share of inter-token latencies below a value, one curve a row."""
    figure, axes = _axes("Inter-token latency", "ms", "share of tokens below")
    colours = iter(COLOURS * 9)
    drawn = False
    largest = 0.0
    for _, row, label in _rows(documents, *ALONE):
        values = sorted(v * 1000 for s in row.samples if s.error is None for v in s.itl_s)
        if len(values) < 2:
            continue
        drawn = True
        shares = [(i + 1) / len(values) for i in range(len(values))]
        step = max(1, len(values) // 500)
        axes.plot(values[::step], shares[::step], color=next(colours), lw=1.4, label=label)
        largest = max(largest, values[int(len(values) * 0.995)])
    if not drawn:
        return None
    axes.set_xlim(0, largest * 1.1 or 1)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def waterfall(documents: Sequence[Document]) -> Figure | None:
    """Where the time to first token goes: medians of its parts."""
    figure, axes = _axes("Time to first token", "ms", "")
    bars = []
    for _, row, label in _rows(documents, *ALONE):
        known = part(row)
        parts = [known.get(name) for name in ("queue_s", "preprocess_s", "prefill_s")]
        medians = [p.median * 1000 if p and p.median is not None else 0.0 for p in parts]
        if parts[2] is not None:
            bars.append((label, medians))
    if not bars:
        return None
    names = ("queue", "preprocess", "vision + prefill")
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        left = [sum(medians[:i]) for _, medians in bars]
        axes.barh(
            [title for title, _ in bars],
            [medians[i] for _, medians in bars],
            left=left,
            color=colour,
            label=name,
            height=0.6,
        )
    axes.invert_yaxis()
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    return figure


def concurrency(documents: Sequence[Document]) -> Figure | None:
    """Total and per-user speed over the number of users or the size of the batch."""
    figure, axes = _axes("Requests in flight", "users or batch size", "tok/s")
    colours = iter(COLOURS * 9)
    drawn = False
    for number in range(len(documents)):
        for name, key in (("concurrency", "users"), ("throughput", "batch")):
            points = []
            for _, row, _label in _rows(documents[number : number + 1], name):
                size = row.conditions.get(key)
                total = row.counts.get("total_tps")
                if total is None and "total_tps" in part(row):
                    total = part(row)["total_tps"].mean
                if isinstance(size, int) and total is not None:
                    each = part(row).get("output_tps")
                    points.append((size, total, each.median if each else None))
            if not points:
                continue
            drawn, colour = True, next(colours)
            prefix = f"{head_names(documents)[number]}: " if len(documents) > 1 else ""
            sizes = [p[0] for p in points]
            label = f"{prefix}{name}, "
            axes.plot(sizes, [p[1] for p in points], "o-", color=colour, label=label + "total")
            if all(p[2] is not None for p in points):
                each_user = [p[2] for p in points]
                axes.plot(sizes, each_user, "s--", color=colour, label=label + "each, decode")
    if not drawn:
        return None
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def roofline(documents: Sequence[Document]) -> Figure | None:
    """Decode speed against bytes a token, under each device's memory-bandwidth roof."""
    figure, axes = _axes("Decode under the memory roof", "GB read a token", "tok/s")
    drawn = False
    for number, document in enumerate(documents):
        bandwidth = document.environment.device.bandwidth_bytes_per_s
        points = []
        for _, row, _label in _rows([document], *ALONE):
            reached = part(row).get("output_tps")
            size = row.ceiling.bytes_per_token if row.ceiling else None
            if size and reached is not None and reached.mean is not None:
                points.append((size / 1e9, reached.mean))
        if not points or not bandwidth:
            continue
        drawn, colour = True, COLOURS[number % len(COLOURS)]
        name = head_names(documents)[number]
        smallest, largest = min(p[0] for p in points) / 2, max(p[0] for p in points) * 2
        roof = [smallest * (largest / smallest) ** (i / 40) for i in range(41)]
        axes.plot(roof, [bandwidth / 1e9 / x for x in roof], color=colour, label=f"{name}: roof")
        axes.plot(*zip(*points, strict=True), "o", color=colour, label=f"{name}: measured")
    if not drawn:
        return None
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=8)
    axes.legend(fontsize=8)
    return figure


def devices(documents: Sequence[Document]) -> Figure | None:
    """Request speed of each result over all its cases, as the 2025 report has it."""
    names = head_names(documents)
    known = [(n, overall_speed(d)) for n, d in zip(names, documents, strict=True)]
    bars = [(name, s.mean, s.std or 0.0) for name, s in known if s.mean is not None]
    if len(bars) < 2:
        return None
    figure, axes = _axes("Request speed, mean and deviation", "tok/s", "")
    axes.barh(
        [b[0] for b in bars],
        [b[1] for b in bars],
        xerr=[b[2] for b in bars],
        color=COLOURS[0],
        height=0.6,
    )
    axes.invert_yaxis()
    return figure


PLOTS: dict[str, Callable[[Sequence[Document]], Figure | None]] = {
    "speed": speed,
    "latencies": latencies,
    "waterfall": waterfall,
    "concurrency": concurrency,
    "roofline": roofline,
    "devices": devices,
}


def figures(documents: Sequence[Document]) -> dict[str, Figure]:
    """Every picture the documents have something for, by name.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    drawn = {name: draw(documents) for name, draw in PLOTS.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element; text is drawn as paths, so it needs no fonts."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "molmo-edge", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, 160 dots an inch.

    Raises:
        BenchmarkError: the place cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    write_bytes(buffer.getvalue(), path)
