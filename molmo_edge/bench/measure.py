"""A benchmark run: requests are measured, rows open, fill and close, and nothing gets lost.

After every row, and every few seconds within one, the document is saved, marked incomplete, so that
even a killed process leaves what it measured. ``vlm`` is anything with ``EdgeVLM``'s ``query``.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from molmo_edge.bench import ceilings, stats
from molmo_edge.bench.cases import Case, count_matches, fresh
from molmo_edge.bench.document import (
    Answer,
    CacheProof,
    Document,
    Level,
    Row,
    Sample,
    Scalar,
    Scenario,
    Settings,
    Stop,
    Summary,
    Warmup,
    Wave,
    now,
)
from molmo_edge.devices.telemetry import Sampler
from molmo_edge.errors import BenchmarkError, EngineError, MolmoEdgeError, QueueFull, RequestError
from molmo_edge.results import Result

logger = logging.getLogger("molmo_edge")

TIMES = ("queue_s", "preprocess_s", "prefill_s", "ttft_s", "itl_s", "tpot_s", "e2e_s")
METRICS = (*TIMES, "output_tps", "request_tps")
"""The metrics of a sample that are summarised."""

FAILURES_IN_A_ROW = 3
SAVE_EVERY_S = 5.0


@dataclass(frozen=True)
class RunOptions:
    """How long to measure, and with which requests. ``width`` is relative to the mean.

    The time limit counts from when an engine is ready; with ``firm`` from the start of the whole
    run, and it then also ends rows that have not reached their minimum number of iterations.

    Raises:
        BenchmarkError: a number is out of range.
    """

    iterations: int = 10
    max_iterations: int = 20
    max_tokens: int = 300
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0
    confidence: float = 0.95
    width: float = 0.02
    time_limit_s: float = 900.0
    firm: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("iterations", self.iterations >= 1, "at least 1"),
            ("max iterations", self.max_iterations >= self.iterations, "at least --iterations"),
            ("max tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 2, "between 0 and 2"),
            ("confidence", 0.5 <= self.confidence < 1, "between 0.5 and 1"),
            ("interval width", 0 < self.width < 1, "between 0 and 1"),
            ("time limit", self.time_limit_s > 0, "above 0 seconds"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise BenchmarkError(f"{name} of a benchmark must be {expected}")

    @classmethod
    def choose(cls, random_weights: bool, **values: Any) -> RunOptions:
        """The given options that are not None; defaults depend on the weights.

        Random weights never end an answer by themselves, so their answers have a fixed length; and
        the stub is tried by people who wait, so its time limit is firm unless one is given.
        """
        known = {name: value for name, value in values.items() if value is not None}
        defaults: dict[str, Any] = {"max_iterations": 2 * known.get("iterations", cls.iterations)}
        if random_weights:
            firm = not known.keys() & {"iterations", "time_limit_s"}
            defaults |= {"max_tokens": 128, "time_limit_s": 210.0, "ignore_eos": True, "firm": firm}
        return cls(**(defaults | known))

    def settings(self) -> Settings:
        """The same for the result document."""
        values = asdict(self)
        del values["firm"]
        return Settings(interval_width=values.pop("width"), **values)

    def rules(self) -> dict[str, str]:
        """The rules in words, with these numbers."""
        stop = stats.STOP_RULE.format(confidence=self.confidence, width=self.width)
        if self.firm:
            stop += f" The time limit of {self.time_limit_s:.0f} s ends a row before its minimum."
        return {"steady": stats.STEADY_RULE, "stop": stop}


@dataclass(frozen=True)
class Load:
    """Parameters of the scenarios beyond one request at a time.

    ``rates`` are requests per second of the Poisson open loop; empty: half and four fifths of the
    best closed-loop rate of the same run. ``fps`` is the camera's frames per second, ``starts`` the
    number of cold starts with disk caches present.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8)
    users: tuple[int, ...] = (1, 2, 4, 8)
    rates: tuple[float, ...] = ()
    fps: float = 10.0
    starts: int = 2

    def __post_init__(self) -> None:
        counts = (*self.batches, *self.users, self.starts)
        if min(counts) < 1 or not self.batches or not self.users:
            raise BenchmarkError("batch sizes, users and cold starts must be 1 or more")
        if any(not 0 < rate < 1e6 for rate in (*self.rates, self.fps)):
            raise BenchmarkError("request rates and camera frames per second must be above 0")


def discard(value: object) -> None:
    """Neither save nor show anything."""


@dataclass
class Bench:
    """One run: what is measured, how long, and the document that grows.

    ``save`` gets the document every few seconds, ``progress`` a line of text per iteration. With
    ``sensors`` every row gets its ceiling and, where the device has sensors, power. ``suite.run``
    sets ``vlm``, ``rows_left`` of the scenario, and ``ends``, when the time limit is spent by
    ``clock``.
    """

    cases: tuple[Case, ...]
    options: RunOptions = field(default_factory=RunOptions)
    load: Load = field(default_factory=Load)
    label: str | None = None
    save: Callable[[Document], object] = discard
    progress: Callable[[str], object] = discard
    sensors: bool = False
    start_command: tuple[str, ...] = ()
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    vlm: Any = None
    rows_left: int = 1
    ends: float = float("inf")

    def __post_init__(self) -> None:
        self.document = Document(
            created=now(),
            label=self.label,
            rules=self.options.rules(),
            settings=self.options.settings(),
        )
        self._saved_at = self._row_began = self.clock()
        self._numbers = itertools.count(1)

    def fresh(self, case: Case) -> Image.Image | None:
        """The case's image as no cache has seen it in this run."""
        return None if case.image is None else fresh(case.image, next(self._numbers))

    def image_cases(self) -> tuple[Case, ...]:
        """The cases that have an image.

        Raises:
            BenchmarkError: there are none.
        """
        cases = tuple(case for case in self.cases if case.image is not None)
        if not cases:
            raise BenchmarkError("this scenario needs at least one image; give --image")
        return cases

    def save_now(self) -> None:
        """Save the document as it is."""
        self.save(self.document)
        self._saved_at = self.clock()

    @contextmanager
    def scenario(self, name: str, title: str) -> Iterator[Scenario]:
        """A failure inside is noted, and raised only if the engine is gone; rows measured before
        it stay."""
        scenario = Scenario(name=name, title=title)
        self.document.scenarios.append(scenario)
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
            self.save_now()

    @contextmanager
    def row(
        self,
        case: Case,
        *,
        caches: bool | None = False,
        title: str | None = None,
        **conditions: Scalar,
    ) -> Iterator[Row]:
        """A row of the current scenario, summarised and saved however it ends.

        An image or prompt that fails, or requests that keep failing, end this row only.
        ``caches`` is what the row claims about reuse; ``None``: nothing.
        """
        row = Row(
            name=case.name,
            title=title or case.title,
            conditions=dict(conditions),
            prompt=case.question,
            image=case.image_info(),
        )
        self.document.scenarios[-1].rows.append(row)
        self._row_began = self.clock()
        sampler, offset_s = Sampler() if self.sensors else None, 0.0
        try:
            with sampler or contextlib.nullcontext():
                if sampler is not None:
                    offset_s = sampler.summary().duration_s
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
            summarise(row, self.options)
            row.counts.setdefault("failed", len(row.samples) - len(row.succeeded))
            if caches is not None:
                row.caches = cache_proof(row, caches)
            if sampler is not None:
                environment = self.document.environment
                row.ceiling = ceilings.of(row, environment, self.vlm, sampler, offset_s)
            self.save_now()

    def request(
        self,
        row: Row | None,
        case: Case,
        image: Image.Image | None,
        *,
        iteration: int,
        began: float = 0.0,
        user: int | None = None,
    ) -> Sample:
        """Measure one request; its answer becomes the row's last.

        A request that the engine refused or lost becomes a sample with ``error``; what would fail
        again in the next iteration (a bad image, a dead engine) is raised.
        """
        start = self.clock()
        try:
            result = self.vlm.query(image, case.question, **self.sampling(case))
        except (RequestError, QueueFull) as exc:
            sample = failed_sample(exc, iteration, user)
        else:
            sample = sample_of(result, iteration, user)
            if row is not None:
                row.answer = self._answer(case, result.text)
        sample.started_s, sample.wall_s = start - began, self.clock() - start
        return sample

    def sampling(self, case: Case) -> dict[str, Any]:
        """The options of a request."""
        crops = {} if case.max_crops is None else {"max_crops": case.max_crops}
        return {
            "max_tokens": self.options.max_tokens,
            "temperature": self.options.temperature,
            "ignore_eos": self.options.ignore_eos,
            **crops,
        }

    def _answer(self, case: Case, text: str) -> Answer:
        """The answer; where values are known and the weights are real, how many it holds."""
        judged = case.expected and self.document.environment.model.random_weights is not True
        matched = count_matches(case.expected, text) if judged else None
        return Answer(text=text, expected=list(case.expected), matched=matched)

    def add(self, row: Row, *samples: Sample, wave: Wave | None = None) -> None:
        """Add one iteration's samples to a row, and save now and then."""
        row.samples.extend(samples)
        if wave is not None:
            row.waves.append(wave)
        self.progress(self._status(row, len(row.waves) or len(row.samples)))
        if self.clock() - self._saved_at > SAVE_EVERY_S:
            self.save_now()

    def _status(self, row: Row, done: int) -> str:
        """Where the run is; the time left is for the minimum of this scenario's rows."""
        minimum = self.options.iterations
        ahead = max(minimum - done, 0) + (self.rows_left - 1) * minimum
        left = round((self.clock() - self._row_began) / done * ahead)
        time_left = f"about {left // 60}:{left % 60:02d} left" if ahead else "until narrow"
        return f"{row.title}: {done} of {minimum}, {time_left}"

    def repeat(self, row: Row, once: Callable[[int], None]) -> None:
        """Call ``once(iteration)``, which adds to ``row``, until there is a reason to stop.

        Rows share evenly what is left of the time limit.

        Raises:
            BenchmarkError: several iterations in a row failed altogether.
        """
        deadline = self.clock() + max(self.ends - self.clock(), 0.0) / self.rows_left
        for iteration in itertools.count():
            once(iteration)
            recent = [s for s in row.samples if s.iteration > iteration - FAILURES_IN_A_ROW]
            if iteration + 1 >= FAILURES_IN_A_ROW and recent and all(s.error for s in recent):
                raise BenchmarkError(
                    f"{FAILURES_IN_A_ROW} iterations in a row failed: {recent[-1].error}"
                )
            row.stopped = self._stop(row, iteration + 1, late=self.clock() >= deadline)
            if row.stopped is not None:
                return

    def _stop(self, row: Row, done: int, *, late: bool) -> Stop | None:
        options = self.options
        if done < options.iterations:
            return "short" if late and options.firm else None
        speeds = [speed for _, speed in speeds_of(row)]
        start = stats.steady_state(speeds).start
        if start is not None and stats.narrow_enough(
            speeds[start:], width=options.width, confidence=options.confidence, seed=options.seed
        ):
            return "narrow"
        return "cap" if done >= options.max_iterations else "time" if late else None


def failed_sample(exc: BaseException, iteration: int, user: int | None = None) -> Sample:
    """A request without an answer."""
    return Sample(iteration=iteration, user=user, error=f"{type(exc).__name__}: {exc}")


def sample_of(result: Result, iteration: int, user: int | None = None) -> Sample:
    """A result's metrics. ``prefill_s`` is TTFT less queueing and preprocessing."""
    m = result.metrics
    prefill = None
    if m.ttft_s is not None and m.preprocess_s is not None:
        prefill = m.ttft_s - m.preprocess_s - (m.queue_s or 0.0)
    return Sample(
        iteration=iteration,
        user=user,
        queue_s=m.queue_s,
        preprocess_s=m.preprocess_s,
        prefill_s=prefill if prefill is not None and prefill >= 0 else None,
        ttft_s=m.ttft_s,
        itl_s=list(m.itl_s or ()),
        tpot_s=m.tpot_s,
        e2e_s=m.e2e_s,
        prompt_tokens=m.prompt_tokens,
        image_tokens=m.image_tokens,
        output_tokens=m.output_tokens,
        cached_tokens=m.cached_tokens,
        output_tps=m.output_tps,
        request_tps=m.request_tps,
        finish_reason=result.finish_reason,
    )


def speeds_of(row: Row) -> list[tuple[int, float]]:
    """(iteration, speed) of what succeeded: waves' total, else decode, else request speed."""
    if row.waves:
        return [(w.iteration, w.total_tps) for w in row.waves if w.total_tps > 0]
    decode = [(s.iteration, s.output_tps) for s in row.succeeded if s.output_tps]
    return decode or [(s.iteration, s.request_tps) for s in row.succeeded if s.request_tps]


def summarise(row: Row, options: RunOptions) -> None:
    """Fill ``warmup``, ``all``, ``cold`` and ``steady`` of a row from its samples and waves."""
    series = speeds_of(row)
    steady = stats.steady_state([speed for _, speed in series])
    start = None if steady.start is None else series[steady.start][0]
    levels = [Level(start=series[one.start][0], median=one.median) for one in steady.levels]
    row.warmup = Warmup(start=start, levels=levels, slowed=steady.slowed)
    row.all = _summaries(row.succeeded, row.waves, options)
    if start is not None:
        row.cold, row.steady = (
            _summaries(
                [s for s in row.succeeded if (s.iteration >= start) is steady_part],
                [w for w in row.waves if (w.iteration >= start) is steady_part],
                options,
            )
            for steady_part in (False, True)
        )


def _summaries(
    samples: Sequence[Sample], waves: Sequence[Wave], options: RunOptions
) -> dict[str, Summary]:
    series: dict[str, list[float]] = {"total_tps": [wave.total_tps for wave in waves]}
    for name in METRICS:
        values = [getattr(sample, name) for sample in samples]
        if name == "itl_s":
            values = list(itertools.chain.from_iterable(values))
        series[name] = [value for value in values if value is not None]
    summaries = {
        name: stats.summarize(values, confidence=options.confidence, seed=options.seed)
        for name, values in series.items()
    }
    return {name: summary for name, summary in summaries.items() if summary is not None}


def cache_proof(row: Row, on: bool) -> CacheProof:
    """Compare what the row claims about reuse with the engine's own counter."""
    counts = [sample.cached_tokens for sample in row.succeeded]
    known = [count for count in counts if count is not None]
    fresh: bool | None = row.conditions.get("fresh_images") is not False if row.image else None
    proved: bool | None = None
    if known and len(known) == len(counts):
        proved = max(known) > 0 if on else max(known) == 0 and fresh is not False
    return CacheProof(
        mode="on" if on else "off",
        cached_tokens=max(known) if known else None,
        fresh_images=fresh,
        proved=proved,
    )
