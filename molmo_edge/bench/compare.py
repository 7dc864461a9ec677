"""Results side by side: the 2025 report's table, further figures, and what is not comparable.

The first lines are the report's own: "tok/s" there is output tokens over the whole request, all
iterations included, cold ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from molmo_edge.bench import stats, tables
from molmo_edge.bench.document import Document, Row, Summary
from molmo_edge.bench.tables import UNKNOWN, interval, number, percent

OVERALL = "overall"
VERSIONS = {"vllm": "vLLM", "torch": "torch", "transformers": "transformers"}
CASES = {
    "boardwalk": "Boardwalk Photo",
    "panels": "Complex Plot",
    "linechart": "Data Interpretation",
}


@dataclass(frozen=True)
class Comparison:
    """One column per result: line titles to cells, and what makes the columns not comparable."""

    heads: Sequence[str]
    lines: dict[str, list[str]]
    flags: Sequence[str]

    def markdown(self) -> str:
        """The table with the flags below it."""
        table = tables.table(["", *self.heads], [[k, *cells] for k, cells in self.lines.items()])
        return tables.page([table, tables.warnings(f"not comparable: {f}" for f in self.flags)])


def compare(documents: Sequence[Document]) -> Comparison:
    """Compare results; the first is the one that ratios refer to."""
    heads = head_names(documents)
    lines = {
        title: cells for title, cells in _lines(documents) if any(cell != UNKNOWN for cell in cells)
    }
    return Comparison(heads, lines, differences(documents, heads))


def head_names(documents: Sequence[Document]) -> list[str]:
    """A distinct heading for each document."""
    heads: list[str] = []
    for document in documents:
        environment = document.environment
        name = document.label or environment.device.name or environment.model.name or "result"
        same = sum(head == name or head.startswith(f"{name} (") for head in heads)
        heads.append(f"{name} ({same + 1})" if same else name)
    return heads


def _lines(documents: Sequence[Document]) -> Iterator[tuple[str, list[str]]]:
    """Line titles, each with one cell per document."""

    def each(cell: Callable[[Document], str]) -> list[str]:
        return [cell(document) for document in documents]

    def ceiling(name: str, digits: int) -> list[str]:
        return each(lambda d: number(_ceiling(d, name), digits))

    overall = [overall_speed(document) for document in documents]
    yield (
        "mean tok/s (std)",
        [UNKNOWN if s.mean is None else f"{number(s.mean)} ({number(s.std)})" for s in overall],
    )
    yield "max tok/s", [number(s.max) for s in overall]
    rows = [row for document in documents for row in case_rows(document)]
    for name, title in (CASES | {r.name: r.title for r in rows if r.name not in CASES}).items():
        speeds = [_speed(_row(document, name)) for document in documents]
        yield f"{title}: mean", [number(s.mean) for s in speeds]
        yield f"{title}: max", [number(s.max) for s in speeds]
    yield "succeeded", each(_succeeded)
    yield "warm-up mean tok/s", each(lambda d: number(_phase(d, steady=False)))
    yield "steady mean tok/s", each(lambda d: number(_phase(d, steady=True)))
    yield (
        "decode tok/s, steady",
        each(lambda d: interval(stats.summarize(_values(d, "output_tps")) or Summary())),
    )
    yield "decode against first", each(lambda d: _ratio(documents[0], d))
    yield "TTFT ms, median", each(_ttft_ms)
    yield "fraction of bandwidth", each(lambda d: percent(_ceiling(d, "bandwidth_share")))
    yield "watts", ceiling("watts", 1)
    yield "joules per token", ceiling("joules_per_token", 3)
    yield "tok/s per watt", ceiling("tps_per_watt", 2)
    known = [conditions(document) for document in documents]
    for name in ("precision", "KV cache", *VERSIONS.values(), "power mode", "caches"):
        yield name, [one[name] or UNKNOWN for one in known]
    yield "measured", each(lambda d: d.created + ("" if d.complete else ", INCOMPLETE"))


def _report_rows(document: Document) -> list[Row]:
    """Rows at batch 1 with a new image each time: the report's kind."""
    found = {scenario.name: scenario.rows for scenario in document.scenarios if scenario.rows}
    return next((found[name] for name in ("report", "latency", "text") if name in found), [])


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
    return [
        value
        for row in case_rows(document)
        for sample in row.succeeded
        if (value := getattr(sample, metric)) is not None
        and (steady is None or row.is_steady(sample) is steady)
    ]


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
    return fmean(values) if values else None


def _ratio(first: Document, other: Document) -> str:
    if first is other:
        return UNKNOWN
    ratio = stats.ratio_interval(_values(other, "output_tps"), _values(first, "output_tps"))
    return UNKNOWN if ratio is None else "x{:.2f} [{:.2f}, {:.2f}]".format(*ratio)


def _ttft_ms(document: Document) -> str:
    values = _values(document, "ttft_s")
    return number(median(values), 0, 1000) if values else UNKNOWN


def _ceiling(document: Document, name: str) -> float | None:
    known = [getattr(row.ceiling, name) for row in case_rows(document) if row.ceiling]
    values = [value for value in known if value is not None]
    return fmean(values) if values else None


def _succeeded(document: Document) -> str:
    rows = _report_rows(document)
    failed = [row.counts["failed"] for row in rows if row.counts.get("failed") is not None]
    # Historic results have no samples.
    total = sum(len(row.samples) for row in rows) or len(rows)
    return percent(1 - sum(count or 0 for count in failed) / total) if failed else UNKNOWN


def _caches(document: Document) -> str | None:
    proofs = [row.caches for row in case_rows(document) if row.caches]
    modes = "/".join(sorted({proof.mode for proof in proofs}))
    return (modes + ("" if all(p.proved for p in proofs) else ", unproved")) or None


def conditions(document: Document) -> dict[str, str | None]:
    """What must be equal before two speeds say something about two devices or versions."""
    device, model = document.environment.device, document.environment.model
    values = {
        "power mode": device.power_mode,
        **{name: document.environment.software.get(key) for key, name in VERSIONS.items()},
        "model": model.name,
        "random weights": model.random_weights,
        "precision": model.precision,
        "KV cache": model.kv_cache_dtype,
        "caches": _caches(document),
        "max_crops": model.max_crops,
        "max_tokens": document.settings.get("max_tokens"),
        "temperature": document.settings.get("temperature"),
        "load_format": model.load_format,
    }
    return {name: None if value is None else str(value) for name, value in values.items()}


def differences(documents: Sequence[Document], heads: Sequence[str]) -> list[str]:
    """What differs between the results, and what is unknown in some of them."""
    flags = []
    each = [conditions(document) for document in documents]
    for name in each[0]:
        values = [one[name] for one in each]
        listed = [
            f"{head}: {value or 'unknown'}" for head, value in zip(heads, values, strict=True)
        ]
        missing = [head for head, value in zip(heads, values, strict=True) if value is None]
        if len(set(values) - {None}) > 1:
            flags.append(f"{name} differs ({'; '.join(listed)})")
        elif missing and (len(missing) < len(values) or name == "power mode"):
            flags.append(f"{name} is unknown in {', '.join(missing)}")
    for head, document in zip(heads, documents, strict=True):
        if not document.complete:
            flags.append(f"{head} is incomplete")
        for row in case_rows(document):
            if row.samples and row.steady_from is None:
                flags.append(f"{head}: {row.title} never became steady")
            if row.samples and row.warmup is not None and row.warmup.slowed:
                flags.append(f"{head}: {row.title} slowed down during the measurement")
    return flags
