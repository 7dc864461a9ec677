"""Plots of results, drawn with matplotlib (extra ``plot``), as SVG text.

Each function draws documents on axes and returns the caption of what it drew.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from molmo_edge.bench.compare import head_names, overall
from molmo_edge.bench.document import Document, Row
from molmo_edge.errors import MissingDependencyError

SIZE = (5.4, 3.5)  # inches; small, so that text stays readable on a phone
COLOURS = ("#3465a4", "#d35400", "#2e8b57", "#8e44ad", "#7f8c8d", "#b8860b", "#c0392b", "#16a085")
ALONE = ("report", "text", "repeat-frame")
Figure = Any
Axes = Any


def _rows(documents: Sequence[Document], *names: str) -> Iterator[tuple[Row, str, str]]:
    """(row, label, colour) of scenarios, the label being no longer than needed."""
    scenarios = [
        (head, scenario)
        for head, document in zip(head_names(documents), documents, strict=True)
        for scenario in document.scenarios
        if scenario.name in names and any(row.samples for row in scenario.rows)
    ]
    heads = [head for head, _ in scenarios]
    count = 0
    for head, scenario in scenarios:
        for row in scenario.rows:
            prefix = f"{head}: " if len(set(heads)) > 1 else ""
            suffix = f" ({scenario.name})" if heads.count(head) > 1 else ""
            unsteady = f", {row.unsteady}" if row.unsteady else ""
            yield row, f"{prefix}{row.title}{suffix}{unsteady}", COLOURS[count % len(COLOURS)]
            count += 1


def speed(documents: Sequence[Document], axes: Axes) -> str:
    """Decode speed by iteration."""
    hollow = dotted = False
    axes.set(title="Decode speed by iteration", xlabel="iteration", ylabel="tok/s")
    for row, label, colour in _rows(documents, *ALONE):
        samples = [sample for sample in row.succeeded if sample.output_tps]
        numbers, speeds = [s.iteration + 1 for s in samples], [s.output_tps for s in samples]
        axes.plot(numbers, speeds, color=colour, lw=1.2, label=label)
        for steady, face in ((True, colour), (False, "white")):
            part = [s for s in samples if bool(row.is_steady(s)) is steady]
            if part:
                points = [s.iteration + 1 for s in part], [s.output_tps for s in part]
                axes.plot(*points, "o", ms=5, mfc=face, mec=colour)
                hollow = hollow or not steady
        if row.steady_from:
            axes.axvline(row.steady_from + 0.5, color=colour, lw=0.8, ls=":")
            dotted = True
    axes.set_ylim(bottom=0)
    caption = "Each point is a request, sent alone."
    caption += " Hollow points are not steady, by the rule below." if hollow else ""
    return caption + (" A dotted line is the end of a warm-up." if dotted else "")


def latencies(documents: Sequence[Document], axes: Axes) -> str:
    """Fraction of inter-token latencies below a value, one curve per row."""
    axes.set(title="Inter-token latency", xlabel="ms", ylabel="fraction of tokens below")
    fractions = np.linspace(0, 0.995, 200)  # without the last, which would press the rest together
    for row, label, colour in _rows(documents, *ALONE):
        values = [latency * 1000 for sample in row.succeeded for latency in sample.itl_s]
        if values:
            quantiles = np.quantile(values, fractions)
            axes.plot(quantiles, fractions, color=colour, lw=1.4, label=label)
    axes.set_xlim(left=0)
    return "Time between two tokens of all requests sent alone, without the longest 0.5 %."


def waterfall(documents: Sequence[Document], axes: Axes) -> str:
    """Parts of the time to first token, as medians."""
    axes.set(title="Time to first token", xlabel="ms")
    rows = [
        (row, label)
        for row, label, _ in _rows(documents, *ALONE)
        if row.summary("prefill_s").median is not None
    ]
    labels, left = [label for _, label in rows], [0.0] * len(rows)
    parts = {"queue_s": "queue", "preprocess_s": "preprocess", "prefill_s": "prefill"}
    for (metric, name), colour in zip(parts.items(), COLOURS, strict=False):
        widths = [(row.summary(metric).median or 0.0) * 1000 for row, _ in rows]
        axes.barh(labels, widths, left=left, color=colour, label=name, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    images = any(sample.image_tokens for row, _ in rows for sample in row.samples)
    caption = "Medians, of the steady state where there is one."
    return caption + (" Prefill includes the vision tower." if images else "")


def concurrency(documents: Sequence[Document], axes: Axes) -> str:
    """Total and per-user speed over the number of users or the size of the batch."""
    axes.set(title="Requests in flight", xlabel="users or batch size", ylabel="tok/s")
    colours = iter(COLOURS * len(documents))
    for head, document in zip(head_names(documents), documents, strict=True):
        for name, key in (("concurrency", "users"), ("throughput", "batch")):
            rows = [row for row, _, _ in _rows([document], name) if key in row.conditions]
            if rows:
                sizes = [row.conditions[key] for row in rows]
                totals = [
                    row.counts.get("total_tps") or row.summary("total_tps").mean for row in rows
                ]
                each = [row.summary("output_tps").median for row in rows]
                label = f"{head}: {name}" if len(documents) > 1 else name
                colour = next(colours)
                axes.plot(sizes, totals, "o-", color=colour, label=f"{label}, total")
                axes.plot(sizes, each, "s--", color=colour, label=f"{label}, each, decode")
    axes.set_ylim(bottom=0)
    return "Output tokens of all requests together, and the median decode speed of each request."


def devices(documents: Sequence[Document], axes: Axes) -> str:
    """Request speed of each result over all its cases, as in the 2025 report."""
    axes.set(title="Request speed, mean and deviation", xlabel="tok/s")
    each = {
        head: overall(document, "request_tps", "all")
        for head, document in zip(head_names(documents), documents, strict=True)
    }
    known = {head: speed for head, speed in each.items() if speed.mean is not None}
    if len(known) > 1:
        means, errors = [s.mean for s in known.values()], [s.std or 0.0 for s in known.values()]
        axes.barh(list(known), means, xerr=errors, color=COLOURS[0], height=0.6)
        axes.invert_yaxis()
    return "Output tokens over whole request time, all iterations; bars of one standard deviation."


PLOTS = {draw.__name__: draw for draw in (speed, latencies, waterfall, concurrency, devices)}


def figures(documents: Sequence[Document]) -> dict[str, tuple[Figure, str]]:
    """Every plot the documents have something for, and its caption, by name."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as exc:
        raise MissingDependencyError(
            "plots need matplotlib; install molmo-edge[plot]", name="matplotlib"
        ) from exc
    heads = zip(head_names(documents), documents, strict=True)
    random = [head for head, one in heads if one.environment.model.random_weights]
    note = f": {', '.join(random)}" if len(random) < len(documents) else ""
    out = {}
    for name, draw in PLOTS.items():
        figure = Canvas(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        caption = draw(documents, axes)
        if random:
            axes.set_title(f"{axes.get_title()}\nrandom weights{note}", fontsize=10)
        if axes.lines or axes.patches:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
            out[name] = figure, caption
    return out


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element; text is drawn as paths, so it needs no fonts."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "molmo-edge", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
