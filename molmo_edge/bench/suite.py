"""The scenarios by name, run one after another.

Scenarios that need the caches off share one engine, those that need them on another; cold starts
need none. An engine that dies ends its scenario; the next one gets a new engine, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from molmo_edge.bench import coldstart, environment, scenarios
from molmo_edge.bench.document import Document, Startup
from molmo_edge.bench.measure import Bench
from molmo_edge.errors import BenchmarkError, EngineError, MolmoEdgeError

Open = Callable[[bool], AbstractContextManager[Any]]
"""Builds an engine; the argument says whether its caches are on."""


@dataclass(frozen=True)
class Entry:
    """One scenario. ``caches`` is ``None`` where it needs no engine of ours."""

    name: str
    title: str
    caches: bool | None
    rows: Callable[[Bench], scenarios.Rows]


# In the order in which each engine is built once.
_ENTRIES = (
    Entry("report", "The report's cases", False, scenarios.each_alone),
    Entry("latency", "Latency at batch 1", False, scenarios.each_alone),
    Entry("text", "Text only", False, scenarios.text),
    Entry("throughput", "Throughput in fixed batches", False, scenarios.throughput),
    Entry("concurrency", "Concurrent users", False, scenarios.concurrency),
    Entry("camera", "A camera's newest frame", False, scenarios.camera),
    Entry("repeat-frame", "The same image again, caches on", True, scenarios.repeat_frame),
    Entry("cold-start", "Process start to first token", None, coldstart.cold_start),
)
SCENARIOS = {entry.name: entry for entry in _ENTRIES}


def choose(names: Sequence[str]) -> list[Entry]:
    """The scenarios of these names, or of "all".

    Raises:
        BenchmarkError: a name is not a scenario.
    """
    unknown = [name for name in names if name not in (*SCENARIOS, "all")]
    if unknown:
        raise BenchmarkError(
            f"unknown scenario {unknown[0][:40]!r}; choose from {', '.join(SCENARIOS)} and all"
        )
    return [entry for entry in SCENARIOS.values() if entry.name in names or "all" in names]


def run(bench: Bench, open_engine: Open, names: Sequence[str] = ("report",)) -> Document:
    """Run scenarios; the document says what is missing, if anything is.

    Ctrl-C ends the run but not the result, which comes back with ``complete`` false.

    Raises:
        MolmoEdgeError: the first engine could not be started, or a scenario is unknown.
    """
    chosen, document = choose(names), bench.document
    firm_end = bench.clock() + bench.options.time_limit_s
    try:
        for caches in (False, True, None):
            left = [entry for entry in chosen if entry.caches is caches]
            while left:
                _run_on_one_engine(bench, open_engine, left, caches, firm_end)
        document.complete = all(scenario.complete for scenario in document.scenarios)
    except KeyboardInterrupt:
        document.notes.append("interrupted: what was measured until then is kept")
    bench.save_now()
    return document


def _run_on_one_engine(
    bench: Bench, open_engine: Open, left: list[Entry], caches: bool | None, firm_end: float
) -> None:
    """Take scenarios from ``left`` until it is empty or the engine is gone."""
    before = len(left)
    bench.progress("starting the engine")
    try:
        with contextlib.nullcontext() if caches is None else open_engine(caches) as bench.vlm:
            if caches is not None and bench.document.startup is None:
                _describe(bench)
            end = bench.clock() + bench.options.time_limit_s
            bench.ends = firm_end if bench.options.firm else end
            while left:
                entry = left.pop(0)
                with bench.scenario(entry.name, entry.title):
                    rows = entry.rows(bench)
                    for number, measure_row in enumerate(rows):
                        bench.rows_left = len(rows) - number
                        measure_row()
    except MolmoEdgeError as exc:
        if not bench.document.scenarios:
            raise
        if not isinstance(exc, EngineError) or len(left) == before:
            while left:
                entry = left.pop(0)
                with bench.scenario(entry.name, entry.title):
                    raise BenchmarkError(f"not run, no engine: {exc}") from exc
    finally:
        bench.vlm = None


def _describe(bench: Bench) -> None:
    """The environment, and the engine's first request, which pays for kernels and caches."""
    document, vlm, case = bench.document, bench.vlm, bench.cases[0]
    document.environment = environment.of(vlm)
    if document.environment.model.random_weights:
        document.notes.append("random weights: speeds are real, answers mean nothing")
    first = bench.request(None, case, case.image, iteration=0, began=bench.clock())
    document.startup = Startup(stages=dict(vlm.startup), first_request=first)
