"""Minutes of mixed load with cancels, deadlines and bad input: does anything give way?

    python benchmarks/soak.py --minutes 10                 # the stub, on the real engine
    python benchmarks/soak.py --minutes 1 --engine fake

Callers in threads and in asyncio ask, stream, leave early, cancel, run into deadlines and send
unusable input. Answers are compared with the first one; every other end must be the error that
belongs to it. Prints requests, ends by kind and memory; exits with 1 when anything was unexpected.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import numpy as np
import psutil

from molmo_edge import EdgeVLM, Request, Result
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import (
    ImageError,
    MolmoEdgeError,
    PromptError,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
    SamplingError,
)

TEXT = "What is this?"
SAMPLE_S = 15.0
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 400, "timeout": 120}
BAD: tuple[tuple[type[MolmoEdgeError], Any, str, dict[str, Any]], ...] = (
    (PromptError, None, "", {}),
    (PromptError, None, "a <im_patch> b", {}),
    (PromptError, None, "word " * 20_000, {}),
    (ImageError, b"\xff\xd8broken", TEXT, {}),
    (SamplingError, None, TEXT, {"temperature": -1}),
)


class Soak:
    """Requests of all kinds until the time is up, and how they ended."""

    def __init__(self, vlm: EdgeVLM, until: float) -> None:
        self.vlm = vlm
        self.until = until
        self.expected = vlm.query(None, TEXT).text
        self.ends: Counter[str] = Counter()
        self.unexpected: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def request(self, kind: str, *fine: type[Exception]) -> Iterator[None]:
        """Count one request, whose end may be success or one of these errors."""
        error: Exception | None = None
        try:
            yield
        except Exception as exc:
            error = exc
        end = f"{kind}: {'success' if error is None else type(error).__name__}"
        with self._lock:
            self.ends[end] += 1
            if error is not None and not isinstance(error, (*fine, QueueFull)):
                self.unexpected[f"{end}: {error}"] += 1

    def check(self, text: str) -> None:
        """An answer must be the first one."""
        if text != self.expected:
            raise AssertionError("wrong answer")

    def thread(self, seed: int) -> None:
        """Requests one after another."""
        dice = random.Random(seed)
        errors = {"cancel": RequestCancelled, "deadline": RequestTimeout}
        kinds = ["query", "image", "stream", "batch", "cancel", "leave", "deadline", "bad"]
        while time.monotonic() < self.until:
            kind = dice.choice(kinds)
            with self.request(kind, *filter(None, [errors.get(kind)])):
                getattr(self, f"_{kind}")(dice)

    def _query(self, dice: random.Random) -> None:
        self.check(self.vlm.query(None, TEXT, timeout=120).text)

    def _image(self, dice: random.Random) -> None:
        height, width = dice.randrange(8, 200), dice.randrange(8, 200)
        pixels = np.frombuffer(dice.randbytes(height * width * 3), np.uint8)
        image = pixels.reshape(height, width, 3)
        self.check(self.vlm.query(image, TEXT, max_crops=1, timeout=300).text)

    def _stream(self, dice: random.Random) -> None:
        self.check("".join(self.vlm.stream(None, TEXT, timeout=120)))

    def _batch(self, dice: random.Random) -> None:
        requests = [Request(None, TEXT) for _ in range(dice.randrange(2, 9))]
        wrong = dice.randrange(len(requests))
        requests[wrong] = Request(None, "")
        for i, one in enumerate(self.vlm.batch(requests, return_exceptions=True)):
            if isinstance(one, Result):
                self.check(one.text)
            elif i != wrong or not isinstance(one, PromptError):
                raise one

    def _cancel(self, dice: random.Random) -> None:
        stream = self.vlm.stream(None, TEXT, **LONG)
        for _ in range(dice.randrange(6)):
            next(stream)
        stream.cancel()
        stream.result()

    def _leave(self, dice: random.Random) -> None:
        for i, _ in enumerate(self.vlm.stream(None, TEXT, **LONG)):
            if i >= dice.randrange(6):
                break

    def _deadline(self, dice: random.Random) -> None:
        self.vlm.query(None, TEXT, **{**LONG, "timeout": dice.random() * 0.3})

    def _bad(self, dice: random.Random) -> None:
        expected, image, text, options = dice.choice(BAD)
        try:
            self.vlm.query(image, text, **options)
        except expected:
            return
        raise AssertionError("bad input was answered")

    async def tasks(self, number: int) -> None:
        """Requests of asyncio, half of them cancelled."""
        await asyncio.gather(*map(self._task, range(number)))

    async def _task(self, seed: int) -> None:
        dice = random.Random(10_000 + seed)
        while time.monotonic() < self.until:
            if dice.random() < 0.5:
                with self.request("aquery"):
                    self.check((await self.vlm.aquery(None, TEXT, timeout=120)).text)
            else:
                with self.request("cancelled task", TimeoutError):
                    request = self.vlm.aquery(None, TEXT, **LONG)
                    await asyncio.wait_for(request, dice.random() * 0.3)


def soak(vlm: EdgeVLM, minutes: float, threads: int, tasks: int) -> dict[str, Any]:
    """Run the load; counts, what was unexpected, and resident memory in MiB."""
    process = psutil.Process()

    def rss_mib() -> float:
        return round(process.memory_info().rss / 2**20, 1)

    vlm.query(np.zeros((64, 64, 3), np.uint8), TEXT, max_crops=1)
    gc.collect()
    before, began = rss_mib(), time.monotonic()
    load = Soak(vlm, began + minutes * 60)
    workers = [threading.Thread(target=load.thread, args=(i,)) for i in range(threads)]
    workers.append(threading.Thread(target=lambda: asyncio.run(load.tasks(tasks))))
    for worker in workers:
        worker.start()
    while alive := [worker for worker in workers if worker.is_alive()]:
        alive[0].join(SAMPLE_S)
        seconds, requests = time.monotonic() - began, load.ends.total()
        harness.progress(f"{seconds:6.0f} s {rss_mib():7.0f} MiB {requests:7d} requests")
    with load.request("the answer after the load"):
        load.check(vlm.query(None, TEXT).text)
    gc.collect()
    return {
        "requests": load.ends.total(),
        "ends": dict(sorted(load.ends.items())),
        "unexpected": dict(sorted(load.unexpected.items())),
        "state": str(vlm.state),
        "rss_before_mib": before,
        "rss_after_mib": rss_mib(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--engine", choices=("thread", "process", "fake"), default="thread")
    parser.add_argument("--model", default="stub", help="checkpoint directory, hub name, or stub")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    settings = vars(arguments) | {"output": None}
    fake = FakeEngine.factory(step_s=0.002)
    with EdgeVLM(
        arguments.model,
        engine=fake if arguments.engine == "fake" else arguments.engine,
        max_model_len=2048,
        kv_cache_memory_gb=0.25,
        enforce_eager=True,
    ) as vlm:
        outcome = soak(vlm, arguments.minutes, arguments.threads, arguments.tasks)
        environment = dict(vlm.environment)
    rows = [[end, str(count)] for end, count in outcome["ends"].items()]
    rows += [[f"UNEXPECTED {end}", str(count)] for end, count in outcome["unexpected"].items()]
    rows += [[name, str(outcome[name])] for name in ("rss_before_mib", "rss_after_mib")]
    print(harness.table([f"{outcome['requests']} requests ended with", "count"], rows))
    if arguments.output is not None:
        document = harness.result("soak", settings=settings, environment=environment, **outcome)
        harness.write(document, arguments.output)
    sys.exit(1 if outcome["unexpected"] or outcome["state"] != "ready" else 0)


if __name__ == "__main__":
    main()
