"""Results side by side: the 2025 report's table, further figures, and what is not comparable.

The first lines are the report's own: "tok/s" there is output tokens over the whole request, all
iterations included, cold ones too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from molmo_edge.bench import stats, tables
from molmo_edge.bench.document import Document, Row, Summary
from molmo_edge.bench.environment import PACKAGES
from molmo_edge.bench.tables import UNKNOWN, interval, number, percent

OVERALL = "overall"
"""The row of a 2025 result that has the figures of all cases together."""

VERSIONS = ("vllm", "torch", "transformers")


@dataclass(frozen=True)
class Comparison:
    """One column per result: line titles to cells.

    ``flags`` are what makes the columns not comparable, and how; ``remarks`` concern one result.
    """

    heads: Sequence[str]
    lines: Mapping[str, Sequence[str]]
    flags: Mapping[str, str]
    remarks: Sequence[str]

    def table(self) -> str:
        return tables.table(["", *self.heads], [[k, *cells] for k, cells in self.lines.items()])

    def details(self) -> str:
        flags = [f"not comparable: {text}" for text in self.flags.values()]
        return tables.warnings([*flags, *self.remarks])


def compare(documents: Sequence[Document]) -> Comparison:
    """Compare results; the first is the one that ratios refer to."""
    heads = head_names(documents)
    cases = {row.name: row.title for document in documents for row in case_rows(document)}
    columns = [dict(_cells(document, documents[0], cases)) for document in documents]
    lines = {title: [column[title] for column in columns] for title in columns[0]}
    known = {title: cells for title, cells in lines.items() if {*cells} != {UNKNOWN}}
    remarks = [
        f"{head}: {row.title} {row.unsteady}"
        for head, document in zip(heads, documents, strict=True)
        for row in case_rows(document)
        if row.unsteady
    ]
    return Comparison(heads, known, differences(documents, heads), remarks)


def head_names(documents: Sequence[Document]) -> list[str]:
    heads: list[str] = []
    for place, document in enumerate(documents, 1):
        environment = document.environment
        name = document.label or environment.device.name or environment.model.name or "result"
        heads.append(f"{name} ({place})" if name in heads else name)
    return heads


def _cells(
    document: Document, first: Document, cases: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Titles and cells of one result's column; ``cases`` are names and titles."""
    speed = overall(document, "request_tps", "all")
    mean = UNKNOWN if speed.mean is None else f"{number(speed.mean)} ({number(speed.std)})"
    yield "mean tok/s (std)", mean
    yield "max tok/s", number(speed.max)
    rows = {row.name: row for row in case_rows(document)}
    for name, title in cases.items():
        summaries = rows[name].all if name in rows else {}
        yield f"{title}: mean", number(summaries.get("request_tps", Summary()).mean)
    yield "succeeded", _succeeded(document)
    yield "warm-up mean tok/s", number(overall(document, "request_tps", "cold").mean)
    yield "steady mean tok/s", number(overall(document, "request_tps", "steady").mean)
    yield "decode tok/s, steady", interval(overall(document, "output_tps", "steady"))
    ratio = stats.ratio_interval(_values(document, "output_tps"), _values(first, "output_tps"))
    text = "x{:.2f} [{:.2f}, {:.2f}]".format(*ratio) if ratio and document is not first else UNKNOWN
    yield "decode against first", text
    yield "TTFT ms, median", number(overall(document, "ttft_s", "steady").median, 0, 1000)
    yield "fraction of bandwidth", percent(_ceiling(document, "bandwidth_share"))
    yield "joules per token", number(_ceiling(document, "joules_per_token"), 3)
    known = conditions(document)
    for name in ("precision", "KV cache", *(PACKAGES[name] for name in VERSIONS), "power mode"):
        yield name, known[name] or UNKNOWN
    yield "caches", known["caches"] or UNKNOWN
    yield "measured", document.created + ("" if document.complete else ", INCOMPLETE")


def _report_rows(document: Document) -> list[Row]:
    """Rows at batch 1 with a new image each time: the report's kind."""
    rows = {scenario.name: scenario.rows for scenario in document.scenarios}
    return rows.get("report") or rows.get("text") or []


def case_rows(document: Document) -> list[Row]:
    """The report's rows, one per case."""
    return [row for row in _report_rows(document) if row.name != OVERALL]


def _values(document: Document, metric: str, phase: str = "steady") -> list[float]:
    """A metric's values of all cases; ``phase`` is "all", "cold" or "steady"."""
    return [
        value
        for row in case_rows(document)
        for sample in row.succeeded
        if (value := getattr(sample, metric)) is not None
        and (phase == "all" or row.is_steady(sample) is (phase == "steady"))
    ]


def overall(document: Document, metric: str, phase: str) -> Summary:
    """A metric over all cases."""
    for row in _report_rows(document):
        if row.name == OVERALL:
            summaries: dict[str, Summary] = getattr(row, phase)
            return summaries.get(metric, Summary())
    return stats.summarize(_values(document, metric, phase)) or Summary()


def _ceiling(document: Document, name: str) -> float | None:
    known = [getattr(row.ceiling, name) for row in case_rows(document) if row.ceiling]
    values = [value for value in known if value is not None]
    return fmean(values) if values else None


def _succeeded(document: Document) -> str:
    rows = _report_rows(document)
    failed = [row.counts["failed"] for row in rows if row.counts.get("failed") is not None]
    # Results of 2025 have no samples.
    total = sum(len(row.samples) for row in rows) or len(rows)
    return percent(1 - sum(count or 0 for count in failed) / total) if failed else UNKNOWN


def conditions(document: Document) -> dict[str, str | None]:
    """What must be equal before two speeds say something about two devices or versions."""
    device, model = document.environment.device, document.environment.model
    proofs = [row.caches for row in case_rows(document) if row.caches]
    caches = "/".join(sorted({proof.mode for proof in proofs}))
    values = {
        "power mode": device.power_mode,
        **{PACKAGES[name]: document.environment.software.get(name) for name in VERSIONS},
        "model": model.name,
        "random weights": model.random_weights,
        "precision": model.precision,
        "KV cache": model.kv_cache_dtype,
        "caches": (caches + ("" if all(p.proved for p in proofs) else ", unproved")) or None,
        "max_crops": model.max_crops,
        "max_tokens": document.settings.get("max_tokens"),
        "temperature": document.settings.get("temperature"),
        "load_format": model.load_format,
    }
    return {name: None if value is None else str(value) for name, value in values.items()}


def differences(documents: Sequence[Document], heads: Sequence[str]) -> dict[str, str]:
    """What differs between the results or is unknown in some of them, each in a sentence."""
    flags = {}
    each = [conditions(document) for document in documents]
    one_device = len({document.environment.device.name for document in documents}) == 1
    for name in each[0]:
        values = dict(zip(heads, (one[name] for one in each), strict=True))
        missing = [head for head, value in values.items() if value is None]
        if len({*values.values()} - {None}) > 1:
            listed = "; ".join(f"{head}: {value or 'unknown'}" for head, value in values.items())
            flags[name] = f"{name} differs ({listed})"
        elif missing and (len(missing) < len(values) or (name == "power mode" and not one_device)):
            flags[name] = f"{name} is unknown in {', '.join(missing)}"
    if incomplete := [h for h, d in zip(heads, documents, strict=True) if not d.complete]:
        flags["completeness"] = f"incomplete: {', '.join(incomplete)}"
    return flags
