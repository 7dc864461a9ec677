"""Results side by side: the 2025 report's table, then what it could not say, and what is unlike.

The first lines are the report's own: "tok/s" there is output tokens over the whole request, all
iterations counted, cold ones too. This module knows nothing about measuring or terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.bench import measure, stats
from molmo_edge.bench.document import Document, Row, Summary
from molmo_edge.bench.tables import UNKNOWN, interval, markdown_table, number

OVERALL = "overall"
CASES = {
    "boardwalk": "Boardwalk Photo",
    "panels": "Complex Plot",
    "linechart": "Data Interpretation",
}


@dataclass(frozen=True)
class Comparison:
    """A table with one column a result, and sentences about what makes columns unlike."""

    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    flags: tuple[str, ...]

    def markdown(self) -> str:
        """As a Markdown table with the flags below it."""
        table = markdown_table(["", *self.heads], self.lines)
        return table + "".join(f"\n- not alike: {flag}" for flag in self.flags) + "\n"


def compare(documents: Sequence[Document]) -> Comparison:
    """Compare results; the first is the one that ratios refer to."""
    heads = head_names(documents)
    lines = []
    for title, cell in _lines(documents):
        cells = [cell(document) for document in documents]
        if any(text != UNKNOWN for text in cells):
            lines.append((title, *cells))
    return Comparison(heads, tuple(lines), tuple(unlike(documents, heads)))


def head_names(documents: Sequence[Document]) -> tuple[str, ...]:
    """A distinct heading for each document."""
    heads: list[str] = []
    for document in documents:
        environment = document.environment
        name = document.label or environment.device.name or environment.model.name or "result"
        taken = sum(head == name or head.startswith(f"{name} (") for head in heads)
        heads.append(f"{name} ({taken + 1})" if taken else name)
    return tuple(heads)


def _lines(documents: Sequence[Document]) -> list[tuple[str, Callable[[Document], str]]]:
    def named(name: str, field: str) -> Callable[[Document], str]:
        def cell(document: Document) -> str:
            row = _row(document, name)
            summary = row.all.get("request_tps") if row else None
            return number(getattr(summary, field) if summary else None)

        return cell

    lines: list[tuple[str, Callable[[Document], str]]] = [
        ("mean tok/s (std)", _mean_std),
        ("max tok/s", lambda d: number(overall_speed(d).max)),
    ]
    for name in _names(documents):
        lines.append((f"{_title(documents, name)}: mean", named(name, "mean")))
        lines.append((f"{_title(documents, name)}: max", named(name, "max")))
    lines += [
        ("succeeded", _succeeded),
        ("warm-up mean tok/s", lambda d: number(_phase(d, "cold"))),
        ("steady mean tok/s", lambda d: number(_phase(d, "steady"))),
        ("decode tok/s, steady", lambda d: interval(_pooled(d, "output_tps"))),
        ("decode against first", lambda d: _ratio(documents[0], d)),
        ("TTFT ms, median", lambda d: number(_median(d, "ttft_s"), 0, 1000)),
        ("share of bandwidth", lambda d: _percent(_ceiling(d, "bandwidth_share"))),
        ("watts", lambda d: number(_ceiling(d, "watts"))),
        ("joules a token", lambda d: number(_ceiling(d, "joules_per_token"), 3)),
        ("tok/s a watt", lambda d: number(_ceiling(d, "tps_per_watt"), 2)),
        ("precision", lambda d: d.environment.model.precision or UNKNOWN),
        ("KV cache", lambda d: d.environment.model.kv_cache_dtype or UNKNOWN),
        ("vLLM", lambda d: d.environment.software.vllm or UNKNOWN),
        ("torch", lambda d: d.environment.software.torch or UNKNOWN),
        ("transformers", lambda d: d.environment.software.transformers or UNKNOWN),
        ("power mode", lambda d: d.environment.device.power_mode or UNKNOWN),
        ("caches", _caches),
        ("measured", lambda d: d.created + ("" if d.complete else ", INCOMPLETE")),
    ]
    return lines


def _report(document: Document) -> list[Row]:
    """Rows at batch 1 with a new picture each time: the report's kind."""
    for wanted in ("report", "latency", "text"):
        for scenario in document.scenarios:
            if scenario.name == wanted and scenario.rows:
                return scenario.rows
    return []


def _row(document: Document, name: str) -> Row | None:
    return next((row for row in _report(document) if row.name == name), None)


def _cases(document: Document) -> list[Row]:
    return [row for row in _report(document) if row.name != OVERALL]


def _names(documents: Sequence[Document]) -> list[str]:
    names = list(CASES)
    for document in documents:
        names += [row.name for row in _cases(document) if row.name not in names]
    return names


def _title(documents: Sequence[Document], name: str) -> str:
    rows = [row for document in documents for row in _cases(document) if row.name == name]
    return CASES.get(name) or rows[0].title


def _values(document: Document, name: str, *, steady: bool) -> list[float]:
    values = []
    for row in _cases(document):
        start = row.warmup.start if row.warmup else None
        for sample in row.samples:
            value = getattr(sample, name)
            settled = start is not None and sample.iteration >= start
            if value is not None and sample.error is None and (settled or not steady):
                values.append(value)
    return values


def overall_speed(document: Document) -> Summary:
    """Request speed over all cases and iterations, as the 2025 report has it."""
    row = _row(document, OVERALL)
    if row is not None:
        return row.all.get("request_tps", Summary())
    values = _values(document, "request_tps", steady=False)
    if not values:
        return Summary()
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(n=len(values), mean=float(np.mean(values)), std=std, max=max(values))


def _mean_std(document: Document) -> str:
    overall = overall_speed(document)
    if overall.mean is None:
        return UNKNOWN
    return f"{number(overall.mean)} ({number(overall.std)})"


def _phase(document: Document, phase: str) -> float | None:
    """Mean request speed before or in the steady state, all cases together."""
    row = _row(document, OVERALL)
    if row is not None:
        summaries = row.cold if phase == "cold" else row.steady
        return summaries.get("request_tps", Summary()).mean
    values = []
    for row in _cases(document):
        start = row.warmup.start if row.warmup else None
        for sample in row.samples if start is not None else []:
            late = sample.iteration >= (start or 0)
            if sample.request_tps is not None and late is (phase == "steady"):
                values.append(sample.request_tps)
    return float(np.mean(values)) if values else None


def _pooled(document: Document, name: str) -> Summary | None:
    values = _values(document, name, steady=True)
    summary = stats.summarize(values)
    if summary is None:
        return None
    return Summary(mean=summary.mean, ci_low=summary.ci_low, ci_high=summary.ci_high)


def _ratio(first: Document, other: Document) -> str:
    if first is other:
        return UNKNOWN
    pair = [_values(document, "output_tps", steady=True) for document in (other, first)]
    found = stats.ratio_interval(*pair)
    return UNKNOWN if found is None else "x{:.2f} [{:.2f}, {:.2f}]".format(*found)


def _median(document: Document, name: str) -> float | None:
    values = _values(document, name, steady=True)
    return float(np.median(values)) if values else None


def _ceiling(document: Document, name: str) -> float | None:
    known = [getattr(row.ceiling, name) for row in _cases(document) if row.ceiling]
    values = [value for value in known if value is not None]
    return float(np.mean(values)) if values else None


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def _succeeded(document: Document) -> str:
    rows = _report(document)
    total = sum(len(row.samples) for row in rows)
    failed = sum(row.counts.get("failed") or 0 for row in rows)
    if total:
        return f"{(total - failed) / total:.0%}"
    known = any(row.counts.get("failed") is not None for row in rows)
    return "100%" if known and failed == 0 else UNKNOWN


def _caches(document: Document) -> str:
    modes = {row.caches.mode for row in _cases(document) if row.caches}
    proved = all(row.caches.proved for row in _cases(document) if row.caches)
    return UNKNOWN if not modes else "/".join(sorted(modes)) + ("" if proved else ", unproved")


CONDITIONS: tuple[tuple[str, Callable[[Document], object]], ...] = (
    ("power mode", lambda d: d.environment.device.power_mode),
    ("vLLM", lambda d: d.environment.software.vllm),
    ("torch", lambda d: d.environment.software.torch),
    ("transformers", lambda d: d.environment.software.transformers),
    ("model", lambda d: d.environment.model.name),
    ("random weights", lambda d: d.environment.model.random_weights),
    ("precision", lambda d: d.environment.model.precision),
    ("KV cache", lambda d: d.environment.model.kv_cache_dtype),
    ("caches", lambda d: None if _caches(d) == UNKNOWN else _caches(d)),
    ("max_crops", lambda d: d.environment.model.max_crops),
    ("max_tokens", lambda d: d.settings.max_tokens),
    ("temperature", lambda d: d.settings.temperature),
    ("load_format", lambda d: d.environment.model.load_format),
)
"""What must be alike before two speeds say something about two devices or versions."""


def unlike(documents: Sequence[Document], heads: Sequence[str]) -> list[str]:
    """What differs between the results, and what is unknown in some of them."""
    flags = []
    for name, read in CONDITIONS:
        values = [read(document) for document in documents]
        known = {str(value) for value in values if value is not None}
        missing = [head for head, value in zip(heads, values, strict=True) if value is None]
        if len(known) > 1:
            told = "; ".join(
                f"{head}: {_word(value)}" for head, value in zip(heads, values, strict=True)
            )
            flags.append(f"{name} differs ({told})")
        elif missing and (known or name == "power mode"):
            flags.append(f"{name} is unknown in {', '.join(missing)}")
    for head, document in zip(heads, documents, strict=True):
        if not document.complete:
            flags.append(f"{head} is incomplete")
        for row in _cases(document):
            if row.samples and (row.warmup is None or row.warmup.start is None):
                flags.append(f"{head}: {row.title} never got steady")
            if measure.speeds_of(row) and row.warmup is not None and row.warmup.slowed:
                flags.append(f"{head}: {row.title} slowed down while it was measured")
    return flags


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)
