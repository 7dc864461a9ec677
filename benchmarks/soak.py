"""Minutes of mixed load with cancels, deadlines and bad input thrown in: does anything give way?

    python benchmarks/soak.py --minutes 10                 # the stub, on the real engine
    python benchmarks/soak.py --minutes 1 --engine fake

Callers in threads and in asyncio ask, stream, leave early, cancel, run into deadlines and send
what cannot be used. Answers that must come are compared with the first one; every other end must be
the error that belongs to it. Prints requests, failures by kind and memory before and after; JSON
goes to benchmarks/results. Exits with 1 when anything was unexpected.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

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

RESULTS = Path(__file__).parent / "results"
TEXT = "What is this?"
_SAMPLE_S = 15.0
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 400}
BAD: dict[str, tuple[type[MolmoEdgeError], Any]] = {
    "empty text": (PromptError, lambda vlm: vlm.query(None, "")),
    "special token": (PromptError, lambda vlm: vlm.query(None, "a <im_patch> b")),
    "too long": (PromptError, lambda vlm: vlm.query(None, "word " * 20_000)),
    "broken picture": (ImageError, lambda vlm: vlm.query(b"\xff\xd8broken", TEXT)),
    "bad sampling": (SamplingError, lambda vlm: vlm.query(None, TEXT, temperature=-1)),
}


class Soak:
    """Counts of what happened, from many threads."""

    def __init__(self, vlm: EdgeVLM, until: float) -> None:
        self.vlm = vlm
        self.until = until
        self.expected = vlm.query(None, TEXT).text
        self.requests: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.unexpected: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, kind: str, end: str, *, fine: bool = True) -> None:
        with self._lock:
            self.requests[kind] += 1
            self.ends[end] += 1
            if not fine:
                self.unexpected[f"{kind}: {end}"] += 1

    def answered(self, kind: str, text: str) -> None:
        right = text == self.expected
        self.count(kind, "right answer" if right else "wrong answer", fine=right)

    def failed(self, kind: str, exc: Exception, wanted: tuple[type[Exception], ...] = ()) -> None:
        self.count(kind, type(exc).__name__, fine=isinstance(exc, wanted))

    def thread(self, seed: int) -> None:
        dice = random.Random(seed)
        kinds = ["query", "picture", "stream", "batch", "cancel", "leave", "deadline", "bad"]
        while time.monotonic() < self.until:
            kind = dice.choice(kinds)
            try:
                getattr(self, f"_{kind}")(dice)
            except QueueFull as exc:
                self.failed(kind, exc, (QueueFull,))
                time.sleep(0.05)
            except Exception as exc:
                self.failed(kind, exc)

    def _query(self, dice: random.Random) -> None:
        self.answered("query", self.vlm.query(None, TEXT, timeout=120).text)

    def _picture(self, dice: random.Random) -> None:
        size = (dice.randrange(8, 200), dice.randrange(8, 200), 3)
        pixels = np.frombuffer(dice.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size)
        result = self.vlm.query(pixels, TEXT, max_crops=1, timeout=300)
        self.answered("picture", result.text)

    def _stream(self, dice: random.Random) -> None:
        self.answered("stream", "".join(self.vlm.stream(None, TEXT, timeout=120)))

    def _batch(self, dice: random.Random) -> None:
        requests = [Request(None, TEXT) for _ in range(dice.randrange(2, 9))]
        wrong = dice.randrange(len(requests))
        requests[wrong] = Request(None, "")
        for i, one in enumerate(self.vlm.batch(requests, return_exceptions=True)):
            if isinstance(one, Result):
                self.answered("batch", one.text)
            else:
                self.failed("batch", one, (PromptError,) if i == wrong else ())

    def _cancel(self, dice: random.Random) -> None:
        stream = self.vlm.stream(None, TEXT, timeout=120, **LONG)
        for _ in range(dice.randrange(6)):
            next(stream)
        stream.cancel()
        try:
            stream.result()
            self.count("cancel", "finished first")
        except RequestCancelled as exc:
            self.failed("cancel", exc, (RequestCancelled,))

    def _leave(self, dice: random.Random) -> None:
        for i, _ in enumerate(self.vlm.stream(None, TEXT, timeout=120, **LONG)):
            if i >= dice.randrange(6):
                break
        self.count("leave", "left early")

    def _deadline(self, dice: random.Random) -> None:
        try:
            self.vlm.query(None, TEXT, timeout=dice.random() * 0.3, **LONG)
            self.count("deadline", "finished first")
        except RequestTimeout as exc:
            self.failed("deadline", exc, (RequestTimeout,))

    def _bad(self, dice: random.Random) -> None:
        kind, (wanted, ask) = dice.choice(list(BAD.items()))
        try:
            ask(self.vlm)
            self.count(kind, "was answered", fine=False)
        except wanted as exc:
            self.failed(kind, exc, (wanted,))

    async def tasks(self, number: int) -> None:
        await asyncio.gather(*map(self._task, range(number)))

    async def _task(self, seed: int) -> None:
        dice = random.Random(10_000 + seed)
        while time.monotonic() < self.until:
            try:
                if dice.random() < 0.5:
                    self.answered("aquery", (await self.vlm.aquery(None, TEXT, timeout=120)).text)
                    continue
                try:
                    ask = self.vlm.aquery(None, TEXT, timeout=120, **LONG)
                    await asyncio.wait_for(ask, dice.random() * 0.3)
                    self.count("cancelled task", "finished first")
                except TimeoutError:
                    self.count("cancelled task", "cancelled")
            except Exception as exc:
                self.failed("asyncio", exc)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--engine", choices=("real", "fake"), default="real")
    parser.add_argument("--model", default="stub")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--cache-dir", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    fake = FakeEngine.factory(step_s=0.002) if asked.engine == "fake" else None
    with EdgeVLM(
        asked.model,
        engine=fake,
        cache_dir=asked.cache_dir,
        max_model_len=2048,
        kv_cache_memory_gb=0.25,
        enforce_eager=True,
    ) as vlm:
        document = _soak(vlm, asked)
    name = asked.model.split("/")[-1] if fake is None else "fake"
    out = asked.out or RESULTS / f"{time.strftime('%Y-%m-%d')}-soak-{name}.json"
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"Written to {out.name}.")
    return 1 if document["unexpected"] or document["state"] != "ready" else 0


def _soak(vlm: EdgeVLM, asked: argparse.Namespace) -> dict[str, Any]:
    process = psutil.Process()
    samples: list[dict[str, float]] = []
    vlm.query(np.zeros((64, 64, 3), np.uint8), TEXT, max_crops=1)
    gc.collect()
    before = process.memory_info().rss / 2**20
    began = time.monotonic()
    soak = Soak(vlm, began + asked.minutes * 60)
    threads = [threading.Thread(target=soak.thread, args=(i,)) for i in range(asked.threads)]
    threads.append(threading.Thread(target=lambda: asyncio.run(soak.tasks(asked.tasks))))
    for thread in threads:
        thread.start()
    while running := [thread for thread in threads if thread.is_alive()]:
        running[0].join(_SAMPLE_S)
        now = time.monotonic() - began
        if now >= (len(samples) + 1) * _SAMPLE_S:
            rss, requests = process.memory_info().rss / 2**20, sum(soak.requests.values())
            samples.append({"s": round(now, 1), "rss_mib": round(rss, 1), "requests": requests})
            print(f"{now:6.0f} s {rss:7.0f} MiB {requests:7d} requests", flush=True)
    right_after = vlm.query(None, TEXT).text == soak.expected
    gc.collect()
    after = process.memory_info().rss / 2**20
    document: dict[str, Any] = {
        "kind": "soak",
        "engine": asked.engine,
        "minutes": asked.minutes,
        "threads": asked.threads,
        "tasks": asked.tasks,
        "environment": dict(vlm.environment),
        "state": str(vlm.state),
        "requests": sum(soak.requests.values()),
        "requests_by_kind": dict(sorted(soak.requests.items())),
        "ends": dict(sorted(soak.ends.items())),
        "unexpected": dict(sorted(soak.unexpected.items())),
        "right_after": right_after,
        "rss_before_mib": round(before, 1),
        "rss_after_mib": round(after, 1),
        "samples": samples,
    }
    if not right_after:
        document["unexpected"] = {**soak.unexpected, "the answer after the load": 1}
    print(f"{document['requests']} requests in {asked.minutes:g} minutes")
    for name, count in document["ends"].items():
        print(f"  {name}: {count}")
    print(f"unexpected: {document['unexpected'] or 'nothing'}")
    print(f"RSS {before:.0f} MiB before, {after:.0f} MiB after")
    return document


if __name__ == "__main__":
    sys.exit(main())
