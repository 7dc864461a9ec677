"""Runs scenarios one after another on engines of their own and keeps the result document.

Scenarios that need the caches off share one engine, those that need them on another; cold starts
need none. An engine that dies ends its scenario; the next one gets a new engine, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from molmo_edge.bench import coldstart, environment, load, measure, scenarios
from molmo_edge.bench.cases import Case
from molmo_edge.bench.document import Document, Startup
from molmo_edge.bench.measure import Plan
from molmo_edge.bench.record import Meter, Observer, Recorder, first_request
from molmo_edge.bench.scenarios import Bench, Load
from molmo_edge.errors import BenchmarkError, EngineError, MolmoEdgeError

CACHES_OFF: dict[str, Any] = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0.0}
CACHES_ON: dict[str, Any] = {"enable_prefix_caching": True, "mm_processor_cache_gb": 1.0}
"""Settings of the two engines. Only fresh pictures miss the encoder's cache: it has no switch."""

Open = Callable[[bool], AbstractContextManager[Any]]
"""Builds an engine; the argument says whether its caches are on."""


@dataclass(frozen=True)
class Scenario:
    """One entry of :data:`SCENARIOS`. ``caches`` is ``None`` where no engine is shared."""

    name: str
    title: str
    caches: bool | None
    rows: Callable[[Bench], int]
    run: Callable[[Bench], None]


def _per_case(bench: Bench) -> int:
    return len(bench.cases)


SCENARIOS = {
    entry.name: entry
    for entry in (
        Scenario("report", "The report's cases", False, _per_case, scenarios.each_alone),
        Scenario("latency", "Latency at batch 1", False, _per_case, scenarios.each_alone),
        Scenario("text", "Text only", False, lambda bench: 2, scenarios.text),
        Scenario(
            "throughput",
            "Throughput in fixed batches",
            False,
            lambda bench: len(bench.load.batches),
            load.throughput,
        ),
        Scenario("concurrency", "Concurrent users", False, load.concurrency_rows, load.concurrency),
        Scenario("camera", "A camera's newest frame", False, lambda bench: 1, load.camera),
        Scenario(
            "repeat-frame",
            "The same picture again, caches on",
            True,
            lambda bench: len(bench.pictures()),
            scenarios.repeat_frame,
        ),
        Scenario(
            "cold-start",
            "Process start to first token",
            None,
            lambda bench: 2,
            coldstart.cold_start,
        ),
    )
}


def known(names: Sequence[str]) -> tuple[Scenario, ...]:
    """The scenarios of these names, ordered so that each engine is built once.

    Raises:
        BenchmarkError: a name is not a scenario.
    """
    for name in names:
        if name not in SCENARIOS:
            raise BenchmarkError(
                f"unknown scenario {name[:40]!r}; there are {', '.join(SCENARIOS)} and all"
            )
    order = {False: 0, True: 1, None: 2}
    chosen = [entry for entry in SCENARIOS.values() if entry.name in names]
    return tuple(sorted(chosen, key=lambda entry: order[entry.caches]))


@dataclass
class Suite:
    """What to run and on what. ``meter`` makes what watches each row beside the timing."""

    open: Open
    cases: tuple[Case, ...]
    plan: Plan
    names: tuple[str, ...] = ("report",)
    load: Load = field(default_factory=Load)
    save: Callable[[Document], None] = lambda document: None
    observer: Observer | None = None
    start_command: tuple[str, ...] = ()
    meter: Callable[[Any, Document], Meter] | None = None
    clock: measure.Clock = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    label: str | None = None
    _began: float = field(default=0.0, init=False)

    def run(self) -> Document:
        """Run everything; the document says what is missing, if anything is.

        Ctrl-C ends the run but not the result: it comes back with ``complete`` false.

        Raises:
            MolmoEdgeError: the first engine could not be started, or a scenario is unknown.
        """
        chosen = known(self.names)
        self._began = self.clock()
        document = Document(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            label=self.label,
            rules=self.plan.rules(),
            settings=self.plan.settings(),
        )
        recorder = Recorder(
            document, self.plan, save=self.save, observer=self.observer, clock=self.clock
        )
        try:
            for caches in (False, True, None):
                group = [entry for entry in chosen if entry.caches is caches]
                if group:
                    self._group(recorder, group, caches)
            document.complete = all(scenario.complete for scenario in document.scenarios)
        except KeyboardInterrupt:
            document.notes.append("interrupted: what was measured until then is kept")
        recorder.save()
        return document

    def _group(self, recorder: Recorder, group: list[Scenario], caches: bool | None) -> None:
        left = list(group)
        while left:
            before = len(left)
            try:
                if caches is None:
                    self._scenarios(recorder, left, None)
                else:
                    with self.open(caches) as vlm:
                        self._started(recorder, vlm)
                        self._scenarios(recorder, left, vlm)
            except MolmoEdgeError as exc:
                if not recorder.document.scenarios:
                    raise
                if not isinstance(exc, EngineError) or len(left) == before:
                    self._give_up(recorder, left, exc)

    def _give_up(self, recorder: Recorder, left: list[Scenario], exc: MolmoEdgeError) -> None:
        while left:
            entry = left.pop(0)
            with recorder.scenario(entry.name, entry.title, 0):
                raise BenchmarkError(f"not run, no engine: {exc}")

    def _started(self, recorder: Recorder, vlm: Any) -> None:
        document = recorder.document
        if document.startup is None:
            document.environment = environment.of(vlm)
            if document.environment.model.random_weights:
                document.notes.append("random weights: speeds are real, answers mean nothing")
            stages = dict(getattr(vlm, "startup", None) or {})
            first = first_request(vlm, self.cases[0], self.plan, clock=self.clock)
            document.startup = Startup(stages=stages, first_request=first)
        if self.meter is not None:
            recorder.meter = self.meter(vlm, document)

    def _scenarios(self, recorder: Recorder, left: list[Scenario], vlm: Any) -> None:
        begins = self._began if self.plan.firm else self.clock()
        bench = Bench(
            vlm=vlm,
            cases=self.cases,
            plan=self.plan,
            recorder=recorder,
            ends=begins + self.plan.time_limit_s,
            load=self.load,
            clock=self.clock,
            sleep=self.sleep,
            start_command=self.start_command,
        )
        while left:
            entry = left.pop(0)
            with recorder.scenario(entry.name, entry.title, entry.rows(bench)):
                entry.run(bench)
