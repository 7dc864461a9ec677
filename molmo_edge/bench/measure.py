"""A benchmark run: requests are measured, rows open, fill and close, and nothing gets lost.

After every row, and every few seconds within one, the document is saved, marked incomplete, so that
even a killed process leaves what it measured.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from PIL import Image

from molmo_edge.bench import ceilings, stats
from molmo_edge.bench.cases import Case, count_matches, fresh
from molmo_edge.bench.document import (
    Answer,
    CacheProof,
    Document,
    Row,
    Sample,
    Scalar,
    Scenario,
    Summary,
    Warmup,
    Wave,
    now,
)
from molmo_edge.devices.telemetry import Sampler
from molmo_edge.errors import BenchmarkError, EngineError, MolmoEdgeError, QueueFull, RequestError
from molmo_edge.results import Result
from molmo_edge.video import Video

logger = logging.getLogger("molmo_edge")

METRICS = (
    "queue_s", "preprocess_s", "prefill_s", "ttft_s", "itl_s", "tpot_s", "e2e_s",
    "prompt_tps", "output_tps", "request_tps",
)  # fmt: skip
"""The metrics of a sample that are summarised."""

FAILURES_IN_A_ROW = 3
SAVE_EVERY_S = 5.0


@dataclass(frozen=True)
class RunOptions:
    """How long to measure, and with which requests.

    Beyond ``iterations`` a row goes on until its interval is narrow. Rows have equal parts of a
    scenario's time limit. ``starts`` are cold starts with disk caches present.
    """

    iterations: int = 10
    max_iterations: int = 20
    time_limit_s: float = 1800.0
    max_tokens: int = 300
    ignore_eos: bool = False
    temperature: float = 0.0
    batches: tuple[int, ...] = (1, 2, 4, 8)
    users: tuple[int, ...] = (1, 2, 4, 8)
    fps: float = 10.0
    starts: int = 2
    frames: tuple[int, ...] = (8,)

    @classmethod
    def choose(cls, random_weights: bool, quick: bool = False, **values: Any) -> RunOptions:
        """The given options that are not None, and defaults for the weights.

        Random weights never end an answer by themselves, and the stub is tried by people who wait.
        """
        known = {name: value for name, value in values.items() if value is not None}
        defaults: dict[str, Any] = {"max_iterations": 2 * known.get("iterations", cls.iterations)}
        if random_weights:
            defaults |= {"max_tokens": 128, "time_limit_s": 210.0, "ignore_eos": True}
        if quick:
            defaults |= {"max_tokens": 128, "time_limit_s": 20.0, "ignore_eos": True}
            defaults |= {"iterations": 5, "max_iterations": 10}
        return cls(**(defaults | known))


@dataclass
class Bench:
    """One run: what is measured, how long, and the document that grows.

    ``save`` gets the document every few seconds, ``progress`` a line of text per iteration. With
    ``sensors`` every row gets its ceiling and, where the device has sensors, power.
    ``scenarios.run`` sets ``vlm``, and ``row_limit_s`` of the scenario.
    """

    cases: tuple[Case, ...]
    options: RunOptions = field(default_factory=RunOptions)
    label: str | None = None
    save: Callable[[Document], object] = lambda document: None
    progress: Callable[[str], object] = lambda text: None
    sensors: bool = False
    start_command: tuple[str, ...] = ()
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    vlm: Any = None
    row_limit_s: float = float("inf")

    def __post_init__(self) -> None:
        self.document = Document(
            created=now(), label=self.label, rules=stats.RULES, settings=asdict(self.options)
        )
        self.row_began = self._saved_at = self.clock()
        self._numbers = itertools.count(1)

    def fresh(self, case: Case) -> Any:
        """The case's image or video as no cache has seen it in this run."""
        if case.video is not None:
            first: Any = case.video.frames[0]
            frames = [fresh(first, next(self._numbers)), *case.video.frames[1:]]
            return replace(case.video, frames=frames)
        return None if case.image is None else fresh(case.image, next(self._numbers))

    def save_now(self) -> None:
        self.save(self.document)
        self._saved_at = self.clock()

    @contextmanager
    def scenario(self, name: str, title: str) -> Iterator[None]:
        """A failure inside is noted, and raised only if the engine is gone."""
        scenario = Scenario(name=name, title=title)
        self.document.scenarios.append(scenario)
        try:
            yield
            scenario.complete = all(row.stopped not in (None, "error") for row in scenario.rows)
        except KeyboardInterrupt:
            scenario.error = "interrupted"
            raise
        except Exception as exc:
            scenario.error = message(exc)
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
            name=case.name, title=title or case.title, conditions=conditions, prompt=case.question
        )
        self.document.scenarios[-1].rows.append(row)
        sampler = Sampler() if self.sensors else None
        try:
            with sampler or contextlib.nullcontext():
                self.row_began = self.clock()
                yield row
        except KeyboardInterrupt:
            row.stopped = "interrupted"
            raise
        except Exception as exc:
            row.stopped, row.error = "error", message(exc)
            if isinstance(exc, EngineError) or not isinstance(exc, MolmoEdgeError):
                raise
        finally:
            summarise(row)
            row.counts.setdefault("failed", len(row.samples) - len(row.succeeded))
            if caches is not None:
                row.caches = cache_proof(row, "on" if caches else "off")
            if sampler is not None:
                shape = None if self.vlm is None else self.vlm.shape
                row.ceiling = ceilings.of(row, self.document.environment, shape, sampler.summary())
            self.save_now()

    def request(
        self, row: Row | None, case: Case, image: Image.Image | Video | None, iteration: int
    ) -> Sample:
        """Measure one request; its answer becomes the row's last.

        A request that the engine refused or lost becomes a sample with ``error``; what would fail
        again in the next iteration (a bad image, a dead engine) is raised.
        """
        options = self.sampling(case)
        if isinstance(image, Video):
            image, options["video"] = None, image
        start = self.clock()
        try:
            result = self.vlm.query(image, case.question, **options)
        except (RequestError, QueueFull) as exc:
            sample = Sample(iteration=iteration, error=message(exc))
        else:
            sample = sample_of(result, iteration)
            if row is not None:
                row.answer = self._answer(case, result.text)
        sample.wall_s = self.clock() - start
        return sample

    def sampling(self, case: Case) -> dict[str, Any]:
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
        self.progress(f"{row.title}: iteration {len(row.waves) or len(row.samples)}")
        if self.clock() - self._saved_at > SAVE_EVERY_S:
            self.save_now()

    def repeat(self, row: Row, once: Callable[[int], None]) -> None:
        """Call ``once(iteration)``, which adds to ``row``, until there is a reason to stop.

        Raises BenchmarkError if several iterations in a row failed altogether.
        """
        deadline = self.clock() + self.row_limit_s
        for iteration in itertools.count():
            once(iteration)
            recent = [s for s in row.samples if s.iteration > iteration - FAILURES_IN_A_ROW]
            if iteration + 1 >= FAILURES_IN_A_ROW and all(s.error for s in recent):
                error = recent[-1].error
                raise BenchmarkError(f"{FAILURES_IN_A_ROW} iterations in a row failed: {error}")
            speeds = [speed for _, speed in speeds_of(row)]
            if iteration + 1 >= self.options.iterations and stats.is_narrow(speeds):
                row.stopped = "narrow"
            elif iteration + 1 >= self.options.max_iterations:
                row.stopped = "cap"
            elif self.clock() >= deadline:
                row.stopped = "time"
            if row.stopped is not None:
                return


def message(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}"


def sample_of(result: Result, iteration: int) -> Sample:
    """A result's metrics. ``prefill_s`` is TTFT less queueing and preprocessing."""
    metrics = asdict(result.metrics)
    sample = Sample(iteration=iteration, finish_reason=result.finish_reason, **metrics)
    if sample.ttft_s is not None and sample.preprocess_s is not None:
        sample.prefill_s = sample.ttft_s - sample.preprocess_s - (sample.queue_s or 0.0)
        if sample.prompt_tokens is not None and sample.prefill_s > 0:
            computed = sample.prompt_tokens - (sample.cached_tokens or 0)
            sample.prompt_tps = computed / sample.prefill_s
    return sample


def speeds_of(row: Row) -> list[tuple[int, float]]:
    """(iteration, speed) of what succeeded: waves' total, else decode, else request speed."""
    if row.waves:
        return [(w.iteration, w.total_tps) for w in row.waves if w.total_tps > 0]
    decode = [(s.iteration, s.output_tps) for s in row.succeeded if s.output_tps]
    return decode or [(s.iteration, s.request_tps) for s in row.succeeded if s.request_tps]


def summarise(row: Row) -> None:
    """Fill ``warmup``, ``all``, ``cold`` and ``steady`` of a row from its samples and waves."""
    series = speeds_of(row)
    steady = stats.steady_state([speed for _, speed in series])
    start = None if steady.start is None else series[steady.start][0]
    row.warmup = Warmup(start=start, slowed=steady.slowed)
    row.all = _summaries(row.succeeded, row.waves)
    if start is not None:
        row.cold, row.steady = (
            _summaries(
                [s for s in row.succeeded if (s.iteration >= start) is settled],
                [w for w in row.waves if (w.iteration >= start) is settled],
            )
            for settled in (False, True)
        )


def _summaries(samples: Sequence[Sample], waves: Sequence[Wave]) -> dict[str, Summary]:
    series: dict[str, list[float]] = {"total_tps": [wave.total_tps for wave in waves]}
    for name in METRICS:
        values = [getattr(sample, name) for sample in samples]
        if name == "itl_s":
            values = list(itertools.chain.from_iterable(values))
        series[name] = [value for value in values if value is not None]
    summaries = {name: stats.summarize(values) for name, values in series.items()}
    return {name: summary for name, summary in summaries.items() if summary is not None}


def cache_proof(row: Row, mode: Literal["on", "off"]) -> CacheProof:
    """Compare what the row claims about reuse with the engine's own counter."""
    counts = [s.cached_tokens for s in row.succeeded if s.cached_tokens is not None]
    counted = counts and len(counts) == len(row.succeeded)
    proved = (mode == "on") is (max(counts) > 0) if counted else None
    return CacheProof(mode=mode, cached_tokens=max(counts, default=None), proved=proved)
