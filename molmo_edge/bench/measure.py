"""One request measured, and a row of them until the numbers are steady and narrow.

This module knows nothing about printing, files or which scenario it serves. ``vlm`` is anything
with ``EdgeVLM``'s ``query``: tests use a double.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from molmo_edge.bench import document, stats
from molmo_edge.bench.cases import Case
from molmo_edge.bench.document import Row, Sample, Stop, Wave
from molmo_edge.errors import BenchmarkError, QueueFull, RequestError

if TYPE_CHECKING:
    from molmo_edge.results import Result

Clock = Callable[[], float]

TIMES = (
    "queue_s",
    "preprocess_s",
    "prefill_s",
    "ttft_s",
    "itl_s",
    "tpot_s",
    "e2e_s",
    "output_tps",
    "request_tps",
    "energy_j",
)
"""The metrics of a sample that are summarised."""

FAILURES_IN_A_ROW = 3


@dataclass(frozen=True)
class Plan:
    """How long to measure. Times in seconds; ``width`` is relative to the mean.

    The time limit counts from when an engine is ready; with ``firm`` from the start of the whole
    run, and it then also ends rows that have not got their least number yet.

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
        for name, good, wanted in checks:
            if not good:
                raise BenchmarkError(f"{name} of a benchmark must be {wanted}")

    def settings(self) -> document.Settings:
        """The same for the result document."""
        known = asdict(self)
        known["interval_width"] = known.pop("width")
        del known["firm"]
        return document.Settings(**known)

    def rules(self) -> dict[str, str]:
        """The rules in words, with this plan's numbers."""
        stop = stats.STOP_RULE.format(confidence=self.confidence, width=self.width)
        if self.firm:
            stop += f" The time limit of {self.time_limit_s:.0f} s goes before the least number."
        return {"steady": stats.STEADY_RULE, "stop": stop}


def ask(
    vlm: Any,
    case: Case,
    image: Image.Image | None,
    plan: Plan,
    *,
    iteration: int,
    began: float = 0.0,
    user: int | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[Sample, str | None]:
    """One request: its sample, and the answer's text (``None`` if it failed).

    A request that the engine refused or lost becomes a sample with ``error``; what would fail
    again in the next iteration (a bad picture, a dead engine) is raised.
    """
    options: dict[str, Any] = {
        "max_tokens": plan.max_tokens,
        "temperature": plan.temperature,
        "ignore_eos": plan.ignore_eos,
    }
    if case.max_crops is not None:
        options["max_crops"] = case.max_crops
    start = clock()
    try:
        result = vlm.query(image, case.question, **options)
    except (RequestError, QueueFull) as exc:
        lost = Sample(
            iteration=iteration,
            started_s=start - began,
            user=user,
            wall_s=clock() - start,
            error=f"{type(exc).__name__}: {exc}",
        )
        return lost, None
    sample = sample_of(
        result, iteration=iteration, user=user, started_s=start - began, wall_s=clock() - start
    )
    return sample, result.text


def sample_of(
    result: Result,
    *,
    iteration: int,
    user: int | None = None,
    started_s: float | None = None,
    wall_s: float | None = None,
) -> Sample:
    """A result's metrics as a sample. ``prefill_s`` is TTFT less queueing and preprocessing."""
    m = result.metrics
    parts = (m.ttft_s, m.queue_s, m.preprocess_s)
    prefill = None
    if m.ttft_s is not None and m.preprocess_s is not None:
        prefill = m.ttft_s - m.preprocess_s - (m.queue_s or 0.0)
    return Sample(
        iteration=iteration,
        started_s=started_s,
        user=user,
        wall_s=wall_s,
        queue_s=parts[1],
        preprocess_s=parts[2],
        prefill_s=prefill if prefill is not None and prefill >= 0 else None,
        ttft_s=parts[0],
        itl_s=list(m.itl_s or ()),
        tpot_s=m.tpot_s,
        e2e_s=m.e2e_s,
        prompt_tokens=m.prompt_tokens,
        image_tokens=m.image_tokens,
        output_tokens=m.output_tokens,
        cached_tokens=m.cached_tokens,
        output_tps=m.output_tps,
        request_tps=m.request_tps,
        energy_j=m.energy_j,
        finish_reason=result.finish_reason,
    )


def repeat(
    row: Row,
    once: Callable[[int], None],
    plan: Plan,
    *,
    deadline: float,
    clock: Clock = time.perf_counter,
) -> Stop:
    """Call ``once(iteration)``, which adds to ``row``, until a reason to stop; return it.

    Raises:
        BenchmarkError: several iterations in a row failed altogether.
    """
    iteration = 0
    while True:
        once(iteration)
        iteration += 1
        if _hopeless(row, iteration):
            reason = row.samples[-1].error
            raise BenchmarkError(f"{FAILURES_IN_A_ROW} iterations in a row failed: {reason}")
        late = clock() >= deadline
        if iteration < plan.iterations:
            if late and plan.firm:
                return "short"
            continue
        start, speeds = steady_part(row)
        narrow = start is not None and stats.narrow_enough(
            speeds, width=plan.width, confidence=plan.confidence, seed=plan.seed
        )
        if narrow:
            return "narrow"
        if iteration >= plan.max_iterations:
            return "cap"
        if late:
            return "time"


def speeds_of(row: Row) -> list[tuple[int, float]]:
    """(iteration, speed) of what succeeded: waves' total, else decode, else request speed."""
    if row.waves:
        return [(w.iteration, w.total_tps) for w in row.waves if w.total_tps > 0]
    done = [s for s in row.samples if s.error is None]
    decode = [(s.iteration, s.output_tps) for s in done if s.output_tps]
    return decode or [(s.iteration, s.request_tps) for s in done if s.request_tps]


def steady_part(row: Row) -> tuple[int | None, list[float]]:
    """First steady iteration (``None``: not settled) and the speeds from there on."""
    series = speeds_of(row)
    found = stats.steady_state([speed for _, speed in series])
    if found.start is None:
        return None, []
    return series[found.start][0], [speed for _, speed in series[found.start :]]


def summarise(row: Row, plan: Plan) -> None:
    """Fill ``warmup``, ``all``, ``cold`` and ``steady`` of a row from its samples and waves."""
    series = speeds_of(row)
    found = stats.steady_state([speed for _, speed in series])
    start = None if found.start is None else series[found.start][0]
    row.warmup = document.Warmup(
        start=start,
        levels=[document.Level(start=series[at][0], median=m) for at, m in found.levels],
        slowed=found.slowed,
    )
    row.all = _summaries(row.samples, row.waves, plan)
    if start is not None:
        row.cold, row.steady = (
            _summaries(
                [s for s in row.samples if (s.iteration >= start) is late],
                [w for w in row.waves if (w.iteration >= start) is late],
                plan,
            )
            for late in (False, True)
        )


def _summaries(
    samples: Sequence[Sample], waves: Sequence[Wave], plan: Plan
) -> dict[str, document.Summary]:
    series: dict[str, list[float]] = {name: [] for name in TIMES}
    for sample in samples:
        for name in TIMES if sample.error is None else ():
            value = getattr(sample, name)
            if isinstance(value, list):
                series[name].extend(value)
            elif value is not None:
                series[name].append(value)
    series["total_tps"] = [wave.total_tps for wave in waves]
    out = {}
    for name, values in series.items():
        summary = stats.summarize(values, confidence=plan.confidence, seed=plan.seed)
        if summary is not None:
            out[name] = document.Summary(**asdict(summary))
    return out


def _hopeless(row: Row, iteration: int) -> bool:
    if iteration < FAILURES_IN_A_ROW:
        return False
    late = [s for s in row.samples if s.iteration >= iteration - FAILURES_IN_A_ROW]
    return bool(late) and all(s.error is not None for s in late)
