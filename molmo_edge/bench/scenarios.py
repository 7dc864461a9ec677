"""Measurements with one request at a time, and what every scenario works with.

Scenarios with many requests in flight live in ``load``, the one that starts fresh processes in
``coldstart``; ``suite`` lists them all by name.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from molmo_edge.bench import cases as case_set
from molmo_edge.bench import measure
from molmo_edge.bench.cases import Case
from molmo_edge.bench.document import Answer, Row
from molmo_edge.bench.measure import Plan
from molmo_edge.bench.record import Recorder
from molmo_edge.errors import BenchmarkError


@dataclass(frozen=True)
class Load:
    """What the scenarios beyond one request at a time are run with.

    ``rates`` are requests a second of the Poisson open loop; empty: half and four fifths of the
    best closed-loop rate of the same run. ``fps`` is the camera's frames a second.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8)
    users: tuple[int, ...] = (1, 2, 4, 8)
    rates: tuple[float, ...] = ()
    fps: float = 10.0
    starts: int = 2

    def __post_init__(self) -> None:
        whole = (*self.batches, *self.users, self.starts)
        if any(n < 1 for n in whole) or not self.batches or not self.users:
            raise BenchmarkError("batch sizes, users and cold starts must be 1 or more")
        if any(not 0 < rate < 1e6 for rate in (*self.rates, self.fps)):
            raise BenchmarkError("request rates and camera frames a second must be above 0")


@dataclass
class Bench:
    """What a scenario works with. ``ends`` is when the time limit is spent, by ``clock``."""

    vlm: Any
    cases: tuple[Case, ...]
    plan: Plan
    recorder: Recorder
    ends: float
    load: Load = field(default_factory=Load)
    clock: measure.Clock = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    start_command: tuple[str, ...] = ()
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def fresh(self, case: Case) -> Image.Image | None:
        """The case's picture as no cache has seen it in this run."""
        return None if case.image is None else case_set.fresh(case.image, next(self._numbers))

    def pictures(self) -> tuple[Case, ...]:
        """The cases that have a picture.

        Raises:
            BenchmarkError: there are none.
        """
        found = tuple(case for case in self.cases if case.image is not None)
        if not found:
            raise BenchmarkError("this scenario needs at least one picture; give --image")
        return found


def alone(bench: Bench, case: Case, *, repeated: bool = False) -> Row:
    """One row at batch 1: a new picture each time, or the very same one where ``repeated``."""
    conditions: dict[str, Any] = {"batch": 1}
    if case.max_crops is not None:
        conditions["max_crops"] = case.max_crops
    if repeated:
        conditions["fresh_images"] = False
    with bench.recorder.row(case, caches=repeated, **conditions) as row:
        _forget(bench)
        began = bench.clock()

        def once(iteration: int) -> None:
            image = case.image if repeated else bench.fresh(case)
            sample, text = measure.ask(
                bench.vlm,
                case,
                image,
                bench.plan,
                iteration=iteration,
                began=began,
                clock=bench.clock,
            )
            if text is not None:
                row.answer = answer(bench, case, text)
            bench.recorder.add(row, sample)

        deadline = bench.recorder.deadline(bench.ends)
        row.stopped = measure.repeat(row, once, bench.plan, deadline=deadline, clock=bench.clock)
    return row


def answer(bench: Bench, case: Case, text: str) -> Answer:
    """The answer and, where right values are known and the weights are real, how many it has."""
    made_up = bench.recorder.document.environment.model.random_weights
    matched = None
    if case.expected and made_up is not True:
        matched = case_set.matched(case.expected, text)
    return Answer(text=text, expected=list(case.expected), matched=matched)


def _forget(bench: Bench) -> None:
    reset = getattr(bench.vlm, "reset_caches", None)
    if reset is not None:
        reset()


def each_alone(bench: Bench) -> None:
    """Every case in turn, a new picture each time."""
    for case in bench.cases:
        alone(bench, case)


def text(bench: Bench) -> None:
    """Prompts without a picture."""
    for case in case_set.text_only():
        alone(bench, case)


def repeat_frame(bench: Bench) -> None:
    """The very same picture and question each time: what the caches are worth."""
    for case in bench.pictures():
        alone(bench, case, repeated=True)
