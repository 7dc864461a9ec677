"""Scenarios with many requests in flight: fixed batches, concurrent users, a camera.

Every request gets a picture of its own, so that nothing is shared between users. In the open
loop a request's ``wall_s`` counts from when it was due, not from when a thread got round to it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from molmo_edge.bench import measure
from molmo_edge.bench.cases import Case
from molmo_edge.bench.document import Row, Sample, Wave
from molmo_edge.bench.scenarios import Bench, answer
from molmo_edge.errors import RequestError

MOST_THREADS = 256


def throughput(bench: Bench) -> None:
    """Batches of fixed size through ``vlm.batch``; one wave is one batch."""
    for size in bench.load.batches:
        _batches(bench, bench.cases, size)


def concurrency_rows(bench: Bench) -> int:
    """How many rows :func:`concurrency` will make."""
    return len(bench.load.users) + (len(bench.load.rates) or 2)


def concurrency(bench: Bench) -> None:
    """Closed loop at each number of users, then Poisson arrivals at each rate."""
    best = 0.0
    for users in bench.load.users:
        row = _closed(bench, users)
        best = max(best, row.counts.get("requests_per_s") or 0.0)
    rates = bench.load.rates or tuple(best * share for share in (0.5, 0.8) if best > 0)
    for rate in rates:
        _open(bench, rate)


def _batches(bench: Bench, cases: Sequence[Case], size: int) -> None:
    from molmo_edge import Request

    case = cases[0]
    plan = bench.plan
    with bench.recorder.row(case, title=f"batch of {size}", batch=size) as row:

        def once(iteration: int) -> None:
            turn = [cases[(iteration * size + i) % len(cases)] for i in range(size)]
            requests = [
                Request(
                    bench.fresh(one),
                    one.question,
                    max_tokens=plan.max_tokens,
                    temperature=plan.temperature,
                    ignore_eos=plan.ignore_eos,
                    max_crops=one.max_crops,
                )
                for one in turn
            ]
            start = bench.clock()
            results = bench.vlm.batch(requests, return_exceptions=True)
            wall = bench.clock() - start
            samples = [_sample(result, iteration, user) for user, result in enumerate(results)]
            bench.recorder.add(row, *samples, wave=wave_of(samples, iteration, wall))

        deadline = bench.recorder.deadline(bench.ends)
        row.stopped = measure.repeat(row, once, plan, deadline=deadline, clock=bench.clock)


def _sample(result: Any, iteration: int, user: int) -> Sample:
    if isinstance(result, RequestError):
        return Sample(iteration=iteration, user=user, error=f"{type(result).__name__}: {result}")
    if isinstance(result, BaseException):
        raise result
    return measure.sample_of(result, iteration=iteration, user=user)


def wave_of(samples: Sequence[Sample], iteration: int, wall_s: float) -> Wave:
    """The whole of one batch: its tokens over its wall time."""
    tokens = sum(sample.output_tokens or 0 for sample in samples)
    return Wave(
        iteration=iteration,
        wall_s=wall_s,
        requests=len(samples),
        failed=sum(sample.error is not None for sample in samples),
        output_tokens=tokens,
        total_tps=tokens / wall_s if wall_s > 0 else 0.0,
    )


def _closed(bench: Bench, users: int) -> Row:
    """Each user asks again as soon as an answer is there, ``iterations`` times."""
    title = f"{users} user{'s' if users > 1 else ''}"
    case = bench.cases[0]
    with bench.recorder.row(case, title=title, loop="closed", users=users) as row:
        began = bench.clock()

        def user_loop(user: int, stop: threading.Event, add: Callable[[Sample], None]) -> None:
            for iteration in range(bench.plan.iterations):
                if stop.is_set():
                    return
                one = bench.cases[(iteration + user) % len(bench.cases)]
                sample, text = measure.ask(
                    bench.vlm,
                    one,
                    bench.fresh(one),
                    bench.plan,
                    iteration=iteration,
                    began=began,
                    user=user,
                    clock=bench.clock,
                )
                if text is not None:
                    row.answer = answer(bench, one, text)
                add(sample)

        jobs = [lambda stop, add, u=user: user_loop(u, stop, add) for user in range(users)]
        _together(bench, row, jobs)
        row.samples.sort(key=lambda s: (s.iteration, s.user or 0))
        _totals(row, bench.clock() - began)
        row.stopped = "fixed"
    return row


def _open(bench: Bench, rate: float) -> None:
    """Requests arrive at random (Poisson) whether or not earlier ones are answered."""
    case = bench.cases[0]
    count = max(bench.plan.iterations, 8)
    rng = random.Random(bench.plan.seed)
    due, at = [], 0.0
    for _ in range(count):
        at += rng.expovariate(rate)
        due.append(at)
    title = f"{rate:.3g} req/s, random"
    with bench.recorder.row(case, title=title, loop="open", rate=rate) as row:
        began = bench.clock()

        def arrive(number: int, stop: threading.Event, add: Callable[[Sample], None]) -> None:
            one = bench.cases[number % len(bench.cases)]
            image = bench.fresh(one)
            while (delay := began + due[number] - bench.clock()) > 0:
                if stop.is_set():
                    return
                bench.sleep(min(delay, 0.1))  # short, so that Ctrl-C need not wait for arrivals
            sample, _ = measure.ask(
                bench.vlm, one, image, bench.plan, iteration=number, began=began, clock=bench.clock
            )
            sample.wall_s = bench.clock() - began - due[number]
            add(sample)

        jobs = [lambda stop, add, n=number: arrive(n, stop, add) for number in range(count)]
        _together(bench, row, jobs)
        row.samples.sort(key=lambda s: s.iteration)
        _totals(row, bench.clock() - began)
        row.counts["offered_per_s"] = rate
        row.stopped = "fixed"


Job = Callable[[threading.Event, Callable[[Sample], None]], None]


def _together(bench: Bench, row: Row, jobs: Sequence[Job]) -> None:
    """Run all jobs at once; on the first failure or Ctrl-C let the others finish and stop."""
    stop, lock = threading.Event(), threading.Lock()

    def add(sample: Sample) -> None:
        with lock:
            bench.recorder.add(row, sample)

    with ThreadPoolExecutor(min(len(jobs), MOST_THREADS), "bench-user") as pool:
        futures = [pool.submit(job, stop, add) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise


def _totals(row: Row, wall_s: float) -> None:
    done = [sample for sample in row.samples if sample.error is None]
    tokens = sum(sample.output_tokens or 0 for sample in done)
    row.counts["wall_s"] = wall_s
    row.counts["requests"] = len(row.samples)
    row.counts["requests_per_s"] = len(done) / wall_s if wall_s > 0 else None
    row.counts["total_tps"] = tokens / wall_s if wall_s > 0 else None


def camera(bench: Bench) -> None:
    """A new picture ``fps`` times a second; always the newest is asked about, the rest dropped.

    The camera is a clock: frame n exists from n / fps seconds on. ``wall_s`` of a sample is the
    age of the frame when its answer was complete.
    """
    case = bench.pictures()[0]
    fps = bench.load.fps
    title = f"{fps:g} frames/s, newest first"
    with bench.recorder.row(case, title=title, fps=fps) as row:
        began = bench.clock()
        last = -1

        def once(iteration: int) -> None:
            nonlocal last
            newest = int((bench.clock() - began) * fps)
            if newest <= last:
                bench.sleep(max(0.0, began + (last + 1) / fps - bench.clock()))
                newest = last + 1
            row.counts["dropped"] = (row.counts.get("dropped") or 0) + newest - last - 1
            last = newest
            sample, text = measure.ask(
                bench.vlm,
                case,
                bench.fresh(case),
                bench.plan,
                iteration=iteration,
                began=began,
                clock=bench.clock,
            )
            sample.wall_s = bench.clock() - began - newest / fps
            if text is not None:
                row.answer = answer(bench, case, text)
            row.counts["answered"] = (row.counts.get("answered") or 0) + (text is not None)
            bench.recorder.add(row, sample)

        deadline = bench.recorder.deadline(bench.ends)
        row.stopped = measure.repeat(row, once, bench.plan, deadline=deadline, clock=bench.clock)
        row.counts["offered"] = last + 1
