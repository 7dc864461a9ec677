"""A result document as a Markdown or HTML page; reads the document only.

The HTML page is self-contained: no scripts, no external resource.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from html import escape
from statistics import median

from molmo_edge.bench import plots, tables
from molmo_edge.bench.compare import compare, head_names
from molmo_edge.bench.document import Ceiling, Document, Row, Scenario
from molmo_edge.bench.environment import software_line
from molmo_edge.bench.tables import UNKNOWN, interval, number, percent


def _ms(metric: str, field: str, digits: int = 0) -> Callable[[Row], str]:
    return lambda row: number(getattr(row.summary(metric), field), digits, 1000)


def _total(row: Row) -> str:
    speed = interval(row.summary("total_tps"))
    return number(row.counts.get("total_tps")) if speed == UNKNOWN else speed


def _steady(row: Row) -> str:
    if row.warmup is None or "disk_caches" in row.conditions:
        return UNKNOWN
    if row.warmup.start is None:
        return "not steady"
    return f"from {row.warmup.start + 1}{', slowed' if row.warmup.slowed else ''}"


def _since_due(row: Row) -> str:
    walls = [sample.wall_s for sample in row.succeeded if sample.wall_s is not None]
    if not walls or not row.conditions.keys() & {"fps", "disk_caches"}:
        return UNKNOWN
    return number(median(walls), 2)


def _caches(row: Row) -> str:
    """What the row claims about caches, and whether the engine's counter agrees."""
    if row.caches is None:
        return UNKNOWN
    verdict = {True: "", False: " (refuted)", None: " (unproved)"}[row.caches.proved]
    return row.caches.mode + verdict


def _ceiling(row: Row) -> Ceiling:
    return row.ceiling or Ceiling()


COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row.title,
    "n": lambda row: str(len(row.waves) or len(row.samples) or UNKNOWN),
    "steady": _steady,
    "since due s": _since_due,
    "preproc ms": _ms("preprocess_s", "median"),
    "ttft ms": _ms("ttft_s", "median"),
    "ttft p99": _ms("ttft_s", "p99"),
    "itl ms": _ms("itl_s", "median", 2),
    "itl p99": _ms("itl_s", "p99", 2),
    "prompt tok/s": lambda row: number(row.summary("prompt_tps").mean),
    "decode tok/s": lambda row: interval(row.summary("output_tps")),
    "request tok/s": lambda row: interval(row.summary("request_tps")),
    "total tok/s": _total,
    "of bandwidth": lambda row: percent(_ceiling(row).bandwidth_share),
    "J/token": lambda row: number(_ceiling(row).joules_per_token, 3),
    "caches": _caches,
}
"""The steady state's where there is one; latencies are medians, speeds means with interval.

"since due" is from when a frame existed, or a process was started.
"""
PAGE_ONLY = ("preproc ms", "ttft p99", "itl ms", "itl p99")
"""Columns that a terminal has no room for."""


def grid(scenario: Scenario, *, full: bool = True) -> str:
    heads = [head for head in COLUMNS if full or head not in PAGE_ONLY]
    lines = [[COLUMNS[head](row) for head in heads] for row in scenario.rows]
    return tables.table(heads, lines, keep=3)


def phases(scenario: Scenario) -> str:
    """Cold and steady apart, in full, for the speeds and the time to first token."""
    fields = ("mean", "median", "std", "min", "max", "p90", "p99")
    lines = []
    for row in scenario.rows:
        parts = {"warm-up": row.cold, "steady": row.steady} if row.steady else {"all": row.all}
        for phase, summaries in parts.items():
            for name in ("output_tps", "request_tps", "total_tps", "ttft_s"):
                if (summary := summaries.get(name)) is not None:
                    digits = 3 if name.endswith("_s") else 1
                    values = [number(getattr(summary, field), digits) for field in fields]
                    lines.append([row.title, phase, name, number(summary.n, 0), *values])
    return tables.table(["case", "phase", "metric", "n", *fields], lines)


def remarks(row: Row) -> Iterator[str]:
    """Sentences about one row that the table has no room for."""
    yield f"{row.title}: ended as {row.stopped}" + (f", {row.error}" if row.error else "")
    if row.unsteady:
        yield f"{row.title}: {row.unsteady}"
    if "frames" in row.conditions and (sample := next(iter(row.succeeded), None)) is not None:
        tokens = f"{sample.image_tokens} of {sample.prompt_tokens} prompt tokens"
        yield f"{row.title}: {tokens} are the video's"
    if failed := row.counts.get("failed"):
        yield f"{row.title}: {failed:.0f} of {len(row.samples)} requests failed"
    if (offered := row.counts.get("offered")) is not None:
        dropped = row.counts.get("dropped") or 0
        yield f"{row.title}: {dropped:.0f} of {offered:.0f} frames dropped"
    if row.answer is not None and row.answer.matched is not None:
        expected = len(row.answer.expected)
        yield f"{row.title}: {row.answer.matched} of {expected} known values in the answer"


def sentence(document: Document) -> str:
    """What was measured, in a sentence."""
    model = document.environment.model
    weights = " (random weights: the answers mean nothing)" if model.random_weights else ""
    count = sum(len(row.samples) for scenario in document.scenarios for row in scenario.rows)
    kinds = "; ".join(scenario.title for scenario in document.scenarios)
    limit = document.settings.get("max_tokens")
    return (
        f"{count or 'Unknown number of'} requests to {model.name or 'an unknown model'}{weights} "
        f"on {document.environment.device.name or 'an unknown device'}, answers of at most {limit} "
        f"tokens: {kinds}."
    )


def head(document: Document) -> Iterator[str]:
    """Precision, software and start, which every printed result begins with."""
    model, device = document.environment.model, document.environment.device
    yield f"precision: {model.precision or UNKNOWN}, KV cache {model.kv_cache_dtype or UNKNOWN}"
    yield f"software: {software_line(document.environment)}"
    yield f"power mode: {device.power_mode or 'unknown'}"
    yield f"measured: {document.created}{'' if document.complete else ', INCOMPLETE'}"
    if document.startup is not None:
        stages = document.startup.stages.items()
        cold = ", ".join(f"{name} {number(s)} s" for name, s in stages if s is not None)
        yield f"cold start: {cold or UNKNOWN}"
        if (first := document.startup.first_request) is not None:
            times = f"ttft {number(first.ttft_s, 2)} s, whole {number(first.e2e_s, 2)} s"
            yield f"first request: {first.error or times}"


def terminal(document: Document) -> str:
    return tables.page(_parts(document, full=False))


def markdown(document: Document) -> str:
    name = document.label or document.environment.model.name or ""
    title = f"# Benchmark {tables.escape(name)}".rstrip()
    return tables.page([title, *_parts(document, full=True)])


def quick(document: Document) -> str:
    """The table of llama-bench, for a terminal."""
    rows = [
        [row.title, name, f"{number(rate.mean, 2)} ± {number(rate.std, 2)}"]
        for scenario in document.scenarios
        for row in scenario.rows
        for name, rate in row.rates.items()
    ]
    table = tables.table(["case", "test", "t/s"], rows)
    remarks = [f"{r.title} {r.unsteady}" for s in document.scenarios for r in s.rows if r.unsteady]
    says = tables.warnings([*document.notes, *remarks])
    return tables.page([tables.escape(sentence(document)), table, says])


def _parts(document: Document, *, full: bool) -> Iterator[str]:
    yield tables.escape(sentence(document))
    yield tables.items(head(document))
    yield tables.warnings(document.notes)
    if not document.complete:
        yield tables.warnings(["This result is incomplete."])
    for scenario in document.scenarios:
        yield f"## {scenario.title}"
        if scenario.error:
            yield tables.warnings([f"Not complete: {scenario.error}"])
        if scenario.rows:
            yield grid(scenario, full=full)
            yield tables.items(line for row in scenario.rows for line in remarks(row))
        if scenario.rows and full:
            yield "### Warm-up and steady"
            yield phases(scenario)
            for row in scenario.rows:
                if row.answer is not None:
                    yield f"### {tables.escape(row.title)}: last answer"
                    yield textwrap.indent(row.answer.text, "    ")  # a code block, taken literally
    if document.rules:
        yield "## Rules"
        yield tables.items(f"{name}: {rule}" for name, rule in document.rules.items())


STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: #222; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }
table { display: block; overflow-x: auto; border-collapse: collapse; white-space: nowrap; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
blockquote { margin: 0; background: #fff4d6; border-left: 4px solid #c77f00; padding: .1rem .5rem; }
li, pre { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { display: inline-block; width: min(100%, 36rem); margin: 0; }
figure svg { width: 100%; height: auto; }
"""


def html(documents: Sequence[Document]) -> str:
    """One page about one or more results; with several, the comparison comes first.

    Raises MissingDependencyError if matplotlib is not installed.
    """
    names = head_names(documents)
    title = f"Benchmark: {', '.join(names)}"
    comparison = tables.html(f"# {tables.escape(title)}\n")
    if len(documents) > 1:
        compared = compare(documents)
        comparison += tables.html(compared.table())
        # Folded, since the list fills the screen of a phone.
        short = f"Not comparable: {', '.join(compared.flags)}" if compared.flags else "Comparable"
        comparison += f"<details><summary>{escape(short)}</summary>\n"
        comparison += f"{tables.html(compared.details())}</details>\n"
    figures = "".join(
        f'<figure id="{name}">{plots.svg(figure)}<figcaption>{escape(caption)}</figcaption>'
        "</figure>\n"
        for name, (figure, caption) in plots.figures(documents).items()
    )
    results: list[str] = []
    for name, document in zip(names, documents, strict=True):
        results += [f"## {tables.escape(name)}", *_parts(document, full=True)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{comparison}\n{figures}\n{tables.html(tables.page(results))}\n</body>\n</html>\n"
    )
