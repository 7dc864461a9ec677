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
import itertools
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
import psutil
from PIL import Image

from molmo_edge import EdgeVLM, Request
from molmo_edge.bench.tables import table
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import InputError, QueueFull, RequestCancelled, RequestTimeout

TEXT = "What is this?"
THREADS = 8
TASKS = 4
PROGRESS_S = 15.0
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 400, "timeout": 120}
BAD: tuple[tuple[Any, str, dict[str, Any]], ...] = (
    (None, "", {}),
    (None, "a <im_patch> b", {}),
    (None, "word " * 20_000, {}),
    (b"\xff\xd8broken", TEXT, {}),
    (None, TEXT, {"temperature": -1}),
)
# Kinds of requests, and the error that one may end with besides QueueFull.
KINDS: dict[str, type[Exception]] = {
    "query": QueueFull,
    "image": QueueFull,
    "stream": QueueFull,
    "batch": QueueFull,
    "cancelled stream": RequestCancelled,
    "stream left": QueueFull,
    "deadline": RequestTimeout,
    "bad input": InputError,
}


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
    def request(self, kind: str, *errors: type[Exception]) -> Iterator[None]:
        """Count one request, whose end may be success or one of these errors."""
        error: Exception | None = None
        try:
            yield
        except Exception as exc:
            error = exc
        end = f"{kind}: {'success' if error is None else type(error).__name__}"
        with self._lock:
            self.ends[end] += 1
            if error is not None and not isinstance(error, (*errors, QueueFull)):
                self.unexpected[f"{end}: {error}"] += 1

    def check(self, text: str) -> None:
        if text != self.expected:
            raise AssertionError("wrong answer")

    def run_thread(self, seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < self.until:
            kind = dice.choice(list(KINDS))
            with self.request(kind, KINDS[kind]):
                self._run(kind, dice)

    def _run(self, kind: str, dice: random.Random) -> None:
        vlm = self.vlm
        match kind:
            case "query":
                self.check(vlm.query(None, TEXT, timeout=120).text)
            case "image":
                image = Image.new("RGB", (dice.randrange(8, 200), dice.randrange(8, 200)), "red")
                self.check(vlm.query(image, TEXT, max_crops=1, timeout=300).text)
            case "stream":
                self.check("".join(vlm.stream(None, TEXT, timeout=120)))
            case "batch":
                for result in vlm.batch([Request(None, TEXT)] * dice.randrange(2, 9)):
                    self.check(result.text)
            case "cancelled stream":
                stream = vlm.stream(None, TEXT, **LONG)
                for _ in range(dice.randrange(6)):
                    next(stream)
                stream.cancel()
                stream.result()
            case "stream left":
                for _ in itertools.islice(vlm.stream(None, TEXT, **LONG), dice.randrange(1, 6)):
                    pass
            case "deadline":
                vlm.query(None, TEXT, **{**LONG, "timeout": dice.random() * 0.3})
            case "bad input":
                unusable, text, options = dice.choice(BAD)
                vlm.query(unusable, text, **options)
                raise AssertionError("bad input was answered")

    async def run_tasks(self) -> None:
        """Requests of asyncio, half of them cancelled."""
        await asyncio.gather(*(self._run_task(10_000 + seed) for seed in range(TASKS)))

    async def _run_task(self, seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < self.until:
            if dice.random() < 0.5:
                with self.request("aquery"):
                    self.check((await self.vlm.aquery(None, TEXT, timeout=120)).text)
            else:
                with self.request("cancelled task", TimeoutError):
                    request = self.vlm.aquery(None, TEXT, **LONG)
                    await asyncio.wait_for(request, dice.random() * 0.3)


def soak(vlm: EdgeVLM, minutes: float) -> dict[str, Any]:
    """Run the load; counts, what was unexpected, and samples of what the process holds."""
    process = psutil.Process()

    def sample() -> dict[str, float]:
        return {
            "seconds": round(time.monotonic() - began, 1),
            "rss_mib": round(process.memory_info().rss / 2**20, 1),
            "threads": process.num_threads(),
            "files": process.num_fds(),
        }

    vlm.query(Image.new("RGB", (64, 64)), TEXT, max_crops=1)
    gc.collect()
    began = time.monotonic()
    samples = [sample()]
    load = Soak(vlm, began + minutes * 60)
    workers = [threading.Thread(target=load.run_thread, args=(i,)) for i in range(THREADS)]
    workers.append(threading.Thread(target=lambda: asyncio.run(load.run_tasks())))
    for worker in workers:
        worker.start()
    while alive := [worker for worker in workers if worker.is_alive()]:
        alive[0].join(PROGRESS_S)
        samples.append(now := sample())
        held = f"{now['rss_mib']:7.0f} MiB {now['threads']:4} threads {now['files']:4} files"
        harness.progress(f"{now['seconds']:6.0f} s {held} {load.ends.total():7d} requests")
    with load.request("the answer after the load"):
        load.check(vlm.query(None, TEXT).text)
    gc.collect()
    return {
        "requests": load.ends.total(),
        "ends": dict(sorted(load.ends.items())),
        "unexpected": dict(sorted(load.unexpected.items())),
        "state": str(vlm.state),
        "samples": [*samples, sample()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--engine", choices=("thread", "process", "fake"), default="thread")
    parser.add_argument("--model", default="stub", help="checkpoint directory, hub name, or stub")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    fake = FakeEngine.factory(step_s=0.002)
    with EdgeVLM(
        arguments.model,
        engine=fake if arguments.engine == "fake" else arguments.engine,
        max_model_len=2048,
        kv_cache_memory_gb=0.25,
        enforce_eager=True,
    ) as vlm:
        outcome = soak(vlm, arguments.minutes)
        environment = dict(vlm.environment)
    rows = [[end, str(count)] for end, count in outcome["ends"].items()]
    rows += [[f"UNEXPECTED {end}", str(count)] for end, count in outcome["unexpected"].items()]
    first, last = outcome["samples"][0], outcome["samples"][-1]
    rows += [[name, f"{first[name]} → {last[name]}"] for name in ("rss_mib", "threads", "files")]
    print(table([f"{outcome['requests']} requests ended with", "count"], rows))
    settings = {"minutes": arguments.minutes, "engine": arguments.engine}
    document = harness.result("soak", settings=settings, environment=environment, **outcome)
    harness.write(document, arguments.output)
    sys.exit(1 if outcome["unexpected"] or outcome["state"] != "ready" else 0)


if __name__ == "__main__":
    main()
