"""The measurements by name: one request at a time, batches, users, a camera, cold starts.

Every request gets an image of its own, so that nothing is shared, unless the scenario is about
reuse. Scenarios that need the caches off share one engine, those that need them on another; cold
starts need none. An engine that dies ends its scenario and those that were to follow on it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from molmo_edge.bench import coldstart, environment
from molmo_edge.bench.cases import Case, drawn_video, text_only
from molmo_edge.bench.document import Document, Sample, Scenario, Startup, Wave
from molmo_edge.bench.measure import Bench, message, sample_of
from molmo_edge.errors import BenchmarkError, MolmoEdgeError, QueueFull, RequestError
from molmo_edge.requests import Request

MAX_THREADS = 256

Open = Callable[[bool], AbstractContextManager[Any]]
"""Builds an engine; the argument says whether its caches are on."""

SCENARIOS: dict[str, tuple[str, bool | None]] = {
    "report": ("One request at a time", False),
    "text": ("Text only", False),
    "throughput": ("Throughput in fixed batches", False),
    "concurrency": ("Concurrent users", False),
    "camera": ("A camera's newest frame", False),
    "video": ("A video", False),
    "repeat-frame": ("The same image again, caches on", True),
    "cold-start": ("Process start to first token", None),
}
"""Title, and whether the engine's caches are on; None where it needs no engine of ours."""


def rows_of(name: str, bench: Bench) -> list[Callable[[], None]]:
    """The functions that measure a scenario, one for each row."""
    match name:
        case "text":
            return [partial(alone, bench, case) for case in text_only()]
        case "throughput":
            return [partial(batches, bench, size) for size in bench.options.batches]
        case "concurrency":
            return [partial(concurrent, bench, users) for users in bench.options.users]
        case "camera":
            return [partial(newest_frame, bench, image_cases(bench)[0])]
        case "video":
            if not bench.vlm.supports("video"):
                bench.document.notes.append("scenario video was skipped: the model has no video")
                return []
            videos = map(drawn_video, bench.options.frames)
            return [partial(alone, bench, case) for case in videos]
        case "repeat-frame":
            return [partial(alone, bench, case, repeated=True) for case in image_cases(bench)]
        case "cold-start":  # its two rows share a directory
            return [partial(coldstart.measure, bench)]
        case _:
            return [partial(alone, bench, case) for case in bench.cases]


def image_cases(bench: Bench) -> list[Case]:
    cases = [case for case in bench.cases if case.image is not None]
    if not cases:
        raise BenchmarkError("this scenario needs at least one image; give --image")
    return cases


def choose(names: Sequence[str]) -> list[str]:
    """These scenarios, or those of "all", in the order in which each engine is built once."""
    for name in names:
        if name not in (*SCENARIOS, "all"):
            raise BenchmarkError(
                f"unknown scenario {name[:40]!r}; choose from {', '.join(SCENARIOS)} and all"
            )
    return [name for name in SCENARIOS if name in names or "all" in names]


def run(bench: Bench, open_engine: Open, names: Sequence[str] = ("report",)) -> Document:
    """Run scenarios; the document says what is missing, after Ctrl-C too.

    Raises MolmoEdgeError if the first engine could not be started, or a scenario is unknown.
    """
    chosen, document = choose(names), bench.document
    try:
        for caches in (False, True, None):
            group = [name for name in chosen if SCENARIOS[name][1] is caches]
            if group:
                _run_on_one_engine(bench, open_engine, group, caches)
        document.complete = all(scenario.complete for scenario in document.scenarios)
    except KeyboardInterrupt:
        document.notes.append("interrupted: what was measured until then is kept")
    bench.save_now()
    return document


def _run_on_one_engine(
    bench: Bench, open_engine: Open, names: Sequence[str], caches: bool | None
) -> None:
    left, scenarios = list(names), bench.document.scenarios
    bench.progress("starting the engine")
    try:
        with contextlib.nullcontext() if caches is None else open_engine(caches) as bench.vlm:
            if caches is not None and bench.document.startup is None:
                _describe(bench)
            while left:
                name = left.pop(0)
                with bench.scenario(name, SCENARIOS[name][0]):
                    rows = rows_of(name, bench)
                    bench.row_limit_s = bench.options.time_limit_s / max(1, len(rows))
                    for measure_row in rows:
                        measure_row()
    except MolmoEdgeError as exc:
        if not scenarios:
            raise
        error = f"not run, no engine: {exc}"
        scenarios += [Scenario(name=name, title=SCENARIOS[name][0], error=error) for name in left]
    finally:
        bench.vlm = None


def _describe(bench: Bench) -> None:
    """The environment, and the engine's first request, which pays for kernels and caches."""
    document, vlm, case = bench.document, bench.vlm, bench.cases[0]
    document.environment = environment.of(vlm)
    if document.environment.model.random_weights:
        document.notes.append("random weights: speeds are real, answers mean nothing")
    first = bench.request(None, case, case.image, 0)
    document.startup = Startup(stages=dict(vlm.startup), first_request=first)


def alone(bench: Bench, case: Case, *, repeated: bool = False) -> None:
    """One row at batch 1: a new image each time, or the very same one where ``repeated``."""
    conditions: dict[str, Any] = {"batch": 1}
    if case.max_crops is not None:
        conditions["max_crops"] = case.max_crops
    if case.video is not None:
        conditions["frames"] = len(case.video.frames)
    with bench.row(case, caches=repeated, **conditions) as row:
        bench.vlm.reset_caches()

        def once(iteration: int) -> None:
            image = case.image if repeated else bench.fresh(case)
            bench.add(row, bench.request(row, case, image, iteration))

        bench.repeat(row, once)
    row.counts |= {name: rate.mean for name, rate in row.rates.items()}


def batches(bench: Bench, size: int) -> None:
    """Batches of fixed size through ``vlm.batch``; one wave is one batch."""
    with bench.row(bench.cases[0], title=f"batch of {size}", batch=size) as row:

        def once(iteration: int) -> None:
            numbers = range(iteration * size, (iteration + 1) * size)
            cases = [bench.cases[number % len(bench.cases)] for number in numbers]
            requests = [
                Request(bench.fresh(case), case.question, **bench.sampling(case)) for case in cases
            ]
            start = bench.clock()
            results = bench.vlm.batch(requests, return_exceptions=True)
            wall_s = bench.clock() - start
            samples = [_batch_sample(result, iteration) for result in results]
            tokens = sum(sample.output_tokens or 0 for sample in samples)
            wave = Wave(
                iteration=iteration, wall_s=wall_s, output_tokens=tokens, total_tps=tokens / wall_s
            )
            bench.add(row, *samples, wave=wave)

        bench.repeat(row, once)


def _batch_sample(result: Any, iteration: int) -> Sample:
    if isinstance(result, RequestError | QueueFull):
        return Sample(iteration=iteration, error=message(result))
    if isinstance(result, BaseException):
        raise result
    return sample_of(result, iteration)


def concurrent(bench: Bench, users: int) -> None:
    """Each user sends the next request once the answer is complete, up to ``iterations`` times.

    The row's time limit stops all after a request each, as do a failure and Ctrl-C.
    """
    title = f"{users} user{'s' if users > 1 else ''}"
    stop, lock = threading.Event(), threading.Lock()
    with bench.row(bench.cases[0], title=title, users=users) as row:

        def work(user: int) -> None:
            for iteration in range(bench.options.iterations):
                if stop.is_set():
                    return
                case = bench.cases[(iteration + user) % len(bench.cases)]
                sample = bench.request(row, case, bench.fresh(case), iteration)
                with lock:
                    bench.add(row, sample)
                if bench.clock() - bench.row_began >= bench.row_limit_s:
                    row.stopped = "time"
                    stop.set()

        with ThreadPoolExecutor(min(users, MAX_THREADS), "bench-user") as pool:
            futures = [pool.submit(work, user) for user in range(users)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        wall_s = bench.clock() - bench.row_began
        row.samples.sort(key=lambda sample: sample.iteration)
        row.counts |= {
            "requests_per_s": len(row.succeeded) / wall_s,
            "total_tps": sum(sample.output_tokens or 0 for sample in row.succeeded) / wall_s,
        }
        row.stopped = row.stopped or "fixed"


def newest_frame(bench: Bench, case: Case) -> None:
    """A new image ``fps`` times per second; always the newest is sent, the rest is dropped.

    The camera is a clock: frame n exists from n / fps seconds on. ``wall_s`` of a sample is the
    age of the frame when its answer was complete.
    """
    fps = bench.options.fps
    with bench.row(case, title=f"{fps:g} frames/s, newest first", fps=fps) as row:
        last = -1

        def once(iteration: int) -> None:
            nonlocal last
            newest = int((bench.clock() - bench.row_began) * fps)
            if newest <= last:
                newest = last + 1
                bench.sleep(max(0.0, bench.row_began + newest / fps - bench.clock()))
            last = newest
            sample = bench.request(row, case, bench.fresh(case), iteration)
            sample.wall_s = bench.clock() - bench.row_began - newest / fps
            bench.add(row, sample)
            row.counts |= {"offered": last + 1, "dropped": last - iteration}

        bench.repeat(row, once)
