"""Keeps the result document while it grows: rows open, fill and close; nothing gets lost.

After every row, and every few seconds within one, the document is written, marked incomplete,
so that even a killed process leaves what it measured. This module knows nothing about printing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from molmo_edge.bench import measure
from molmo_edge.bench.cases import Case
from molmo_edge.bench.document import CacheProof, Document, Row, Sample, Scenario, Wave
from molmo_edge.bench.measure import Plan
from molmo_edge.errors import BenchmarkError, EngineError, MolmoEdgeError, QueueFull

logger = logging.getLogger("molmo_edge")

SAVE_EVERY_S = 5.0


class Observer(Protocol):
    """Who wants to watch. Every method is called from the thread that measures."""

    def scenario(self, title: str, rows: int) -> None: ...

    def row(self, title: str, least: int) -> None: ...

    def iteration(self, row: Row, done: int) -> None: ...

    def row_done(self, row: Row) -> None: ...


class Silent:
    """Watches nothing."""

    def scenario(self, title: str, rows: int) -> None: ...

    def row(self, title: str, least: int) -> None: ...

    def iteration(self, row: Row, done: int) -> None: ...

    def row_done(self, row: Row) -> None: ...


class Meter(Protocol):
    """Who measures beside a row: power and ceilings, see ``ceilings``."""

    def start(self) -> None: ...

    def finish(self, row: Row) -> None: ...


class Recorder:
    """The growing document. ``save`` writes it somewhere; ``meter`` adds ceilings to rows."""

    def __init__(
        self,
        document: Document,
        plan: Plan,
        *,
        save: Callable[[Document], None] = lambda document: None,
        observer: Observer | None = None,
        meter: Meter | None = None,
        clock: measure.Clock = time.perf_counter,
    ) -> None:
        self.document = document
        self.plan = plan
        self.observer: Observer = observer or Silent()
        self.clock = clock
        self.meter = meter
        self._save = save
        self._saved_at = clock()
        self._scenario: Scenario | None = None
        self._rows_left = 1

    @contextmanager
    def scenario(self, name: str, title: str, rows: int) -> Iterator[Scenario]:
        """A scenario of ``rows`` rows. A failure inside is noted, and raised only if the engine
        is gone; the rows measured before it stay."""
        scenario = Scenario(name=name, title=title)
        self.document.scenarios.append(scenario)
        self._scenario, self._rows_left = scenario, max(rows, 1)
        self.observer.scenario(title, rows)
        try:
            yield scenario
            scenario.complete = all(row.stopped not in (None, "error") for row in scenario.rows)
        except KeyboardInterrupt:
            scenario.error = "interrupted"
            raise
        except Exception as exc:
            scenario.error = f"{type(exc).__name__}: {exc}"
            if isinstance(exc, EngineError):
                raise
            if not isinstance(exc, MolmoEdgeError):
                logger.exception("scenario %s crashed; the others go on", name)
        finally:
            self.save()

    @contextmanager
    def row(
        self,
        case: Case,
        *,
        caches: bool | None = False,
        title: str | None = None,
        **conditions: str | int | float | bool | None,
    ) -> Iterator[Row]:
        """A row of the current scenario; on leaving, however, it is summarised and saved.

        A picture or prompt that fails, or requests that keep failing, end this row only.
        ``caches`` says what the row claims about reuse; ``None``: nothing to claim.
        """
        if self._scenario is None:
            raise BenchmarkError("a row was opened outside a scenario")
        row = Row(
            name=case.name,
            title=title or case.title,
            conditions=dict(conditions),
            prompt=case.question,
            image=case.picture(),
        )
        self._scenario.rows.append(row)
        self.observer.row(row.title, self.plan.iterations)
        if self.meter is not None:
            self.meter.start()
        try:
            yield row
        except KeyboardInterrupt:
            row.stopped = "interrupted"
            raise
        except Exception as exc:
            row.stopped, row.error = "error", f"{type(exc).__name__}: {exc}"
            expected = isinstance(exc, MolmoEdgeError)
            if not expected or (isinstance(exc, EngineError) and not isinstance(exc, QueueFull)):
                raise
        finally:
            self._rows_left = max(self._rows_left - 1, 1)
            measure.summarise(row, self.plan)
            failed = sum(sample.error is not None for sample in row.samples)
            row.counts.setdefault("failed", failed)
            if caches is not None:
                row.caches = prove(row, caches)
            if self.meter is not None:
                self.meter.finish(row)
            self.observer.row_done(row)
            self.save()

    def add(self, row: Row, *samples: Sample, wave: Wave | None = None) -> None:
        """Add one iteration's samples to a row, tell the observer, and save now and then."""
        row.samples.extend(samples)
        if wave is not None:
            row.waves.append(wave)
        done = len(row.waves) if row.waves else len(row.samples)
        self.observer.iteration(row, done)
        if self.clock() - self._saved_at > SAVE_EVERY_S:
            self.save()

    def deadline(self, ends: float) -> float:
        """When this row should end, if rows share evenly what is left until ``ends``."""
        now = self.clock()
        return now + max(ends - now, 0.0) / self._rows_left

    def save(self) -> None:
        """Write the document as it is now."""
        self._save(self.document)
        self._saved_at = self.clock()


def prove(row: Row, on: bool) -> CacheProof:
    """What the engine's own counter says about reuse in this row."""
    done = [sample for sample in row.samples if sample.error is None]
    counts = [sample.cached_tokens for sample in done]
    fresh: bool | None = row.conditions.get("fresh_images") is not False if row.image else None
    largest: int | None = None
    proved: bool | None = None
    known = [count for count in counts if count is not None]
    if known:
        largest = max(known)
    if known and len(known) == len(counts):
        proved = largest != 0 if on else (largest == 0 and fresh is not False)
    return CacheProof(
        mode="on" if on else "off", cached_tokens=largest, fresh_images=fresh, proved=proved
    )


def first_request(vlm: Any, case: Case, plan: Plan, *, clock: measure.Clock) -> Sample:
    """The engine's very first request, which pays for kernels and caches; kept apart."""
    image = case.image
    sample, _ = measure.ask(vlm, case, image, plan, iteration=0, clock=clock)
    return sample
