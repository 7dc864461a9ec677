"""Results side by side: the 2025 report's table, further figures, and what is not comparable.

The first lines are the report's own: "tok/s" there is output tokens over the whole request, all
iterations included, cold ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.bench import measure, stats
from molmo_edge.bench.document import Document, Row, Summary
from molmo_edge.bench.tables import (
    UNKNOWN,
    Block,
    Items,
    Table,
    interval,
    markdown,
    number,
    percent,
)

OVERALL = "overall"
CASES = {
    "boardwalk": "Boardwalk Photo",
    "panels": "Complex Plot",
    "linechart": "Data Interpretation",
}


@dataclass(frozen=True)
class Comparison:
    """A table with one column per result, and what makes the columns not comparable."""

    table: Table
    flags: tuple[str, ...]

    def blocks(self) -> list[Block]:
        """The table with the flags below it."""
        return [self.table, Items([f"not comparable: {flag}" for flag in self.flags], "warning")]

    def markdown(self) -> str:
        """The same as Markdown."""
        return markdown(self.blocks())


def compare(documents: Sequence[Document]) -> Comparison:
    """Compare results; the first is the one that ratios refer to."""
    heads = head_names(documents)
    lines = [
        [title, *cells]
        for title, cells in _lines(documents).items()
        if any(cell != UNKNOWN for cell in cells)
    ]
    return Comparison(Table(["", *heads], lines), tuple(differences(documents, heads)))


def head_names(documents: Sequence[Document]) -> tuple[str, ...]:
    """A distinct heading for each document."""
    heads: list[str] = []
    for document in documents:
        environment = document.environment
        name = document.label or environment.device.name or environment.model.name or "result"
        same = sum(head == name or head.startswith(f"{name} (") for head in heads)
        heads.append(f"{name} ({same + 1})" if same else name)
    return tuple(heads)


def _lines(documents: Sequence[Document]) -> dict[str, list[str]]:
    """Line titles to one cell per document."""

    def each(cell: Callable[[Document], str]) -> list[str]:
        return [cell(document) for document in documents]

    def ceiling(name: str, digits: int = 1) -> list[str]:
        return [number(_ceiling(document, name), digits) for document in documents]

    overall = [overall_speed(document) for document in documents]
    lines = {
        "mean tok/s (std)": [
            UNKNOWN if s.mean is None else f"{number(s.mean)} ({number(s.std)})" for s in overall
        ],
        "max tok/s": [number(s.max) for s in overall],
    }
    rows = [row for document in documents for row in case_rows(document)]
    titles = CASES | {row.name: row.title for row in rows if row.name not in CASES}
    for name, title in titles.items():
        speeds = [_speed(_row(document, name)) for document in documents]
        lines[f"{title}: mean"] = [number(s.mean) for s in speeds]
        lines[f"{title}: max"] = [number(s.max) for s in speeds]
    lines |= {
        "succeeded": each(_succeeded),
        "warm-up mean tok/s": [number(_phase(d, steady=False)) for d in documents],
        "steady mean tok/s": [number(_phase(d, steady=True)) for d in documents],
        "decode tok/s, steady": [
            interval(stats.summarize(_values(d, "output_tps")) or Summary()) for d in documents
        ],
        "decode against first": [_ratio(documents[0], d) for d in documents],
        "TTFT ms, median": [_median_ms(d, "ttft_s") for d in documents],
        "fraction of bandwidth": [percent(_ceiling(d, "bandwidth_share")) for d in documents],
        "watts": ceiling("watts"),
        "joules per token": ceiling("joules_per_token", 3),
        "tok/s per watt": ceiling("tps_per_watt", 2),
        "precision": each(lambda d: d.environment.model.precision or UNKNOWN),
        "KV cache": each(lambda d: d.environment.model.kv_cache_dtype or UNKNOWN),
        "vLLM": each(lambda d: d.environment.software.vllm or UNKNOWN),
        "torch": each(lambda d: d.environment.software.torch or UNKNOWN),
        "transformers": each(lambda d: d.environment.software.transformers or UNKNOWN),
        "power mode": each(lambda d: d.environment.device.power_mode or UNKNOWN),
        "caches": each(lambda d: _caches(d) or UNKNOWN),
        "measured": each(lambda d: d.created + ("" if d.complete else ", INCOMPLETE")),
    }
    return lines


def _report_rows(document: Document) -> list[Row]:
    """Rows at batch 1 with a new image each time: the report's kind."""
    for name in ("report", "latency", "text"):
        for scenario in document.scenarios:
            if scenario.name == name and scenario.rows:
                return scenario.rows
    return []


def _row(document: Document, name: str) -> Row | None:
    return next((row for row in _report_rows(document) if row.name == name), None)


def _speed(row: Row | None) -> Summary:
    """Request speed over all iterations."""
    return row.all.get("request_tps", Summary()) if row else Summary()


def case_rows(document: Document) -> list[Row]:
    """The report's rows, one per case."""
    return [row for row in _report_rows(document) if row.name != OVERALL]


def _values(document: Document, metric: str, *, steady: bool | None = True) -> list[float]:
    """A metric's values of all cases: of the steady state, the warm-up, or (None) all of them."""
    values = []
    for row in case_rows(document):
        for sample in row.succeeded:
            settled = None
            if row.steady_from is not None:
                settled = sample.iteration >= row.steady_from
            value = getattr(sample, metric)
            if value is not None and (steady is None or settled is steady):
                values.append(value)
    return values


def overall_speed(document: Document) -> Summary:
    """Request speed over all cases and iterations, as the 2025 report has it."""
    row = _row(document, OVERALL)
    if row is not None:
        return _speed(row)
    return stats.summarize(_values(document, "request_tps", steady=None)) or Summary()


def _phase(document: Document, *, steady: bool) -> float | None:
    """Mean request speed before or in the steady state, all cases together."""
    row = _row(document, OVERALL)
    if row is not None:
        return (row.steady if steady else row.cold).get("request_tps", Summary()).mean
    values = _values(document, "request_tps", steady=steady)
    return float(np.mean(values)) if values else None


def _ratio(first: Document, other: Document) -> str:
    if first is other:
        return UNKNOWN
    ratio = stats.ratio_interval(_values(other, "output_tps"), _values(first, "output_tps"))
    return UNKNOWN if ratio is None else "x{:.2f} [{:.2f}, {:.2f}]".format(*ratio)


def _median_ms(document: Document, metric: str) -> str:
    values = _values(document, metric)
    return number(float(np.median(values)), 0, 1000) if values else UNKNOWN


def _ceiling(document: Document, name: str) -> float | None:
    known = [getattr(row.ceiling, name) for row in case_rows(document) if row.ceiling]
    values = [value for value in known if value is not None]
    return float(np.mean(values)) if values else None


def _succeeded(document: Document) -> str:
    rows = _report_rows(document)
    total = sum(len(row.samples) for row in rows)
    counts = [row.counts.get("failed") for row in rows]
    failed = sum(count or 0 for count in counts)
    if total:
        return percent((total - failed) / total)
    return "100%" if failed == 0 and any(count is not None for count in counts) else UNKNOWN


def _caches(document: Document) -> str | None:
    proofs = [row.caches for row in case_rows(document) if row.caches]
    modes = "/".join(sorted({proof.mode for proof in proofs}))
    return (modes + ("" if all(p.proved for p in proofs) else ", unproved")) or None


CONDITIONS: dict[str, Callable[[Document], object]] = {
    "power mode": lambda d: d.environment.device.power_mode,
    "vLLM": lambda d: d.environment.software.vllm,
    "torch": lambda d: d.environment.software.torch,
    "transformers": lambda d: d.environment.software.transformers,
    "model": lambda d: d.environment.model.name,
    "random weights": lambda d: d.environment.model.random_weights,
    "precision": lambda d: d.environment.model.precision,
    "KV cache": lambda d: d.environment.model.kv_cache_dtype,
    "caches": _caches,
    "max_crops": lambda d: d.environment.model.max_crops,
    "max_tokens": lambda d: d.settings.max_tokens,
    "temperature": lambda d: d.settings.temperature,
    "load_format": lambda d: d.environment.model.load_format,
}
"""What must be equal before two speeds say something about two devices or versions."""


def differences(documents: Sequence[Document], heads: Sequence[str]) -> list[str]:
    """What differs between the results, and what is unknown in some of them."""
    flags = []
    for name, read in CONDITIONS.items():
        values = dict(zip(heads, map(read, documents), strict=True))
        missing = [head for head, value in values.items() if value is None]
        known = {str(value) for value in values.values() if value is not None}
        if len(known) > 1:
            listed = "; ".join(f"{head}: {_text(value)}" for head, value in values.items())
            flags.append(f"{name} differs ({listed})")
        elif missing and (known or name == "power mode"):
            flags.append(f"{name} is unknown in {', '.join(missing)}")
    for head, document in zip(heads, documents, strict=True):
        if not document.complete:
            flags.append(f"{head} is incomplete")
        for row in case_rows(document):
            if row.samples and row.steady_from is None:
                flags.append(f"{head}: {row.title} never became steady")
            if measure.speeds_of(row) and row.warmup is not None and row.warmup.slowed:
                flags.append(f"{head}: {row.title} slowed down during the measurement")
    return flags


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)
