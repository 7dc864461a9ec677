"""The measurements: one request at a time, fixed batches, concurrent users, a camera.

Every request gets an image of its own, so that nothing is shared, unless the scenario is about
reuse. In the open loop ``wall_s`` counts from when a request was due, not from when a thread could
send it. ``suite`` lists the scenarios by name; cold starts are in ``coldstart``.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from molmo_edge.bench.cases import Case, text_only
from molmo_edge.bench.document import Row, Sample, Wave
from molmo_edge.bench.measure import Bench, failed_sample, sample_of
from molmo_edge.errors import RequestError
from molmo_edge.requests import Request

MAX_THREADS = 256


Rows = list[Callable[[], object]]
"""Functions that measure a row each."""


def each_alone(bench: Bench) -> Rows:
    """Every case in turn, a new image each time."""
    return [partial(alone, bench, case) for case in bench.cases]


def text(bench: Bench) -> Rows:
    """Prompts without an image."""
    return [partial(alone, bench, case) for case in text_only()]


def repeat_frame(bench: Bench) -> Rows:
    """The same image and question each time: the effect of the caches."""
    return [partial(alone, bench, case, repeated=True) for case in bench.image_cases()]


def throughput(bench: Bench) -> Rows:
    """Batches of fixed size through ``vlm.batch``."""
    return [partial(batches, bench, size) for size in bench.load.batches]


def concurrency(bench: Bench) -> Rows:
    """Closed loop at each number of users, then Poisson arrivals at each rate."""
    closed: Rows = [partial(closed_loop, bench, users) for users in bench.load.users]
    if bench.load.rates:
        return closed + [partial(open_loop, bench, rate) for rate in bench.load.rates]
    return closed + [partial(open_loop_below_best, bench, fraction) for fraction in (0.5, 0.8)]


def camera(bench: Bench) -> Rows:
    """A camera's newest frame."""
    return [partial(newest_frame, bench, bench.image_cases()[0])]


def alone(bench: Bench, case: Case, *, repeated: bool = False) -> None:
    """One row at batch 1: a new image each time, or the very same one where ``repeated``."""
    conditions: dict[str, Any] = {"batch": 1}
    if case.max_crops is not None:
        conditions["max_crops"] = case.max_crops
    if repeated:
        conditions["fresh_images"] = False
    with bench.row(case, caches=repeated, **conditions) as row:
        bench.vlm.reset_caches()
        began = bench.clock()

        def once(iteration: int) -> None:
            image = case.image if repeated else bench.fresh(case)
            bench.add(row, bench.request(row, case, image, iteration=iteration, began=began))

        bench.repeat(row, once)


def batches(bench: Bench, size: int) -> None:
    """Batches of fixed size through ``vlm.batch``; one wave is one batch."""
    with bench.row(bench.cases[0], title=f"batch of {size}", batch=size) as row:

        def once(iteration: int) -> None:
            first = iteration * size
            cases = [bench.cases[(first + i) % len(bench.cases)] for i in range(size)]
            requests = [
                Request(bench.fresh(case), case.question, **bench.sampling(case)) for case in cases
            ]
            start = bench.clock()
            results = bench.vlm.batch(requests, return_exceptions=True)
            wall_s = bench.clock() - start
            samples = [_sample(one, iteration, user) for user, one in enumerate(results)]
            bench.add(row, *samples, wave=_wave(samples, iteration, wall_s))

        bench.repeat(row, once)


def _sample(result: Any, iteration: int, user: int) -> Sample:
    if isinstance(result, RequestError):
        return failed_sample(result, iteration, user)
    if isinstance(result, BaseException):
        raise result
    return sample_of(result, iteration, user)


def _wave(samples: Sequence[Sample], iteration: int, wall_s: float) -> Wave:
    tokens = sum(sample.output_tokens or 0 for sample in samples)
    return Wave(
        iteration=iteration,
        wall_s=wall_s,
        requests=len(samples),
        failed=sum(sample.error is not None for sample in samples),
        output_tokens=tokens,
        total_tps=tokens / wall_s if wall_s > 0 else 0.0,
    )


def closed_loop(bench: Bench, users: int) -> None:
    """Each user sends the next request once the answer is complete, ``iterations`` times."""
    title = f"{users} user{'s' if users > 1 else ''}"
    with bench.row(bench.cases[0], title=title, loop="closed", users=users) as row:
        began = bench.clock()

        def work(user: int, stop: threading.Event) -> Iterator[Sample]:
            for iteration in range(bench.options.iterations):
                if stop.is_set():
                    return
                case = bench.cases[(iteration + user) % len(bench.cases)]
                image = bench.fresh(case)
                yield bench.request(row, case, image, iteration=iteration, began=began, user=user)

        _concurrently(bench, row, users, work, began)


def open_loop_below_best(bench: Bench, fraction: float) -> None:
    """Arrivals at a fraction of the best rate that the closed loops reached."""
    rows = bench.document.scenarios[-1].rows
    best = max(row.counts.get("requests_per_s") or 0.0 for row in rows)
    if best > 0:
        open_loop(bench, best * fraction)


def open_loop(bench: Bench, rate: float) -> None:
    """Requests arrive at random (Poisson) whether or not earlier ones are answered."""
    count = max(bench.options.iterations, 8)
    rng = random.Random(bench.options.seed)
    due = [0.0]
    for _ in range(count):
        due.append(due[-1] + rng.expovariate(rate))
    title = f"{rate:.3g} req/s, random"
    with bench.row(bench.cases[0], title=title, loop="open", rate=rate) as row:
        began = bench.clock()

        def work(number: int, stop: threading.Event) -> Iterator[Sample]:
            case = bench.cases[number % len(bench.cases)]
            image = bench.fresh(case)
            arrival = began + due[number + 1]
            while (delay := arrival - bench.clock()) > 0:
                if stop.is_set():
                    return
                bench.sleep(min(delay, 0.1))  # short, so that Ctrl-C need not wait for arrivals
            sample = bench.request(row, case, image, iteration=number, began=began)
            sample.wall_s = bench.clock() - arrival
            yield sample

        row.counts["offered_per_s"] = rate
        _concurrently(bench, row, count, work, began)


def _concurrently(
    bench: Bench,
    row: Row,
    count: int,
    work: Callable[[int, threading.Event], Iterator[Sample]],
    began: float,
) -> None:
    """Run ``work`` in ``count`` threads; a failure or Ctrl-C stops all after a request."""
    stop, lock = threading.Event(), threading.Lock()

    def job(number: int) -> None:
        for sample in work(number, stop):
            with lock:
                bench.add(row, sample)

    with ThreadPoolExecutor(min(count, MAX_THREADS), "bench-user") as pool:
        futures = [pool.submit(job, number) for number in range(count)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    wall_s = bench.clock() - began
    row.samples.sort(key=lambda s: (s.iteration, s.user or 0))
    tokens = sum(sample.output_tokens or 0 for sample in row.succeeded)
    row.counts["wall_s"] = wall_s
    row.counts["requests"] = len(row.samples)
    row.counts["requests_per_s"] = len(row.succeeded) / wall_s if wall_s > 0 else None
    row.counts["total_tps"] = tokens / wall_s if wall_s > 0 else None
    row.stopped = "fixed"


def newest_frame(bench: Bench, case: Case) -> None:
    """A new image ``fps`` times per second; always the newest is sent, the rest is dropped.

    The camera is a clock: frame n exists from n / fps seconds on. ``wall_s`` of a sample is the
    age of the frame when its answer was complete.
    """
    fps = bench.load.fps
    with bench.row(case, title=f"{fps:g} frames/s, newest first", fps=fps) as row:
        began, counts, last = bench.clock(), row.counts, -1
        counts |= {"dropped": 0, "answered": 0}

        def once(iteration: int) -> None:
            nonlocal last
            newest = int((bench.clock() - began) * fps)
            if newest <= last:
                bench.sleep(max(0.0, began + (last + 1) / fps - bench.clock()))
                newest = last + 1
            counts["dropped"] = (counts["dropped"] or 0) + newest - last - 1
            last = newest
            sample = bench.request(row, case, bench.fresh(case), iteration=iteration, began=began)
            sample.wall_s = bench.clock() - began - newest / fps
            counts["answered"] = (counts["answered"] or 0) + (sample.error is None)
            counts["offered"] = last + 1
            bench.add(row, sample)

        bench.repeat(row, once)
