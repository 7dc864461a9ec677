"""What lies between the engine's step and the user's iterator, without a model.

    python benchmarks/handover.py --output benchmarks/results/handover-cpu.json

An engine that computes nothing stands in for vLLM, so that all that is left is ours. Reported are
the microseconds a token that the loop takes when nobody reads along, and, with steps of two
milliseconds, how long each piece of text takes from the end of its step to the thread that iterates
over `stream`, and to the coroutine that iterates over `astream`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from molmo_edge import EdgeVLM
from molmo_edge.bench.document import write_bytes
from molmo_edge.bench.environment import device_of, versions
from molmo_edge.devices.detect import detect
from molmo_edge.interface import EngineInfo, Rendered, Turn, Update
from molmo_edge.sampling import Sampling

STEP_S = 0.002
WORD = "word "


class Idle:
    """One request at a time, a word a step; `made` holds when each step ended."""

    info = EngineInfo(max_model_len=1 << 20)

    def __init__(self, step_s: float) -> None:
        self.made: list[float] = []
        self._step_s = step_s
        self._left: dict[str, int] = {}

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        return Rendered(None, 1, 0, [1])

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        self._left[request_id] = sampling.max_tokens

    def step(self) -> list[Update]:
        if self._step_s:
            time.sleep(self._step_s)
        updates = []
        for request_id in list(self._left):
            self._left[request_id] -= 1
            reason = None if self._left[request_id] else "length"
            if reason is not None:
                del self._left[request_id]
            updates.append(Update(request_id, WORD, [5], finish_reason=reason))
        if self._step_s:
            self.made.append(time.perf_counter())
        return updates

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._left.pop(request_id, None)

    def close(self) -> None:
        self._left.clear()


def loop_us(tokens: int, repeats: int) -> list[float]:
    """Microseconds a token of whole answers that nobody reads along."""
    samples = []
    with EdgeVLM(engine=lambda: Idle(0.0)) as vlm:
        for _ in range(repeats + 1):
            began = time.perf_counter()
            vlm.query(None, "q", max_tokens=tokens)
            samples.append((time.perf_counter() - began) / tokens * 1e6)
    return samples[1:]


def handed_us(tokens: int, *, asynchronous: bool) -> list[float]:
    """Microseconds from the end of a step to the iteration that got its text."""
    engines: list[Idle] = []

    def build() -> Idle:
        engines.append(Idle(STEP_S))
        return engines[0]

    # When, and how many words had come by then: a reader that was held up gets several at once.
    seen: list[tuple[float, int]] = []

    def note(text: str) -> None:
        words = len(text) // len(WORD) + (seen[-1][1] if seen else 0)
        seen.append((time.perf_counter(), words))

    async def read(vlm: EdgeVLM) -> None:
        async for text in vlm.astream(None, "q", max_tokens=tokens):
            note(text)

    with EdgeVLM(engine=build) as vlm:
        if asynchronous:
            asyncio.run(read(vlm))
        else:
            for text in vlm.stream(None, "q", max_tokens=tokens):
                note(text)
    return [(when - engines[0].made[words - 1]) * 1e6 for when, words in seen]


def summary(samples: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return {"median": statistics.median(ordered), "p99": p99, "max": ordered[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--streamed", type=int, default=1000, help="tokens read one by one")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    asked = parser.parse_args()
    samples = {
        "loop": loop_us(asked.tokens, asked.repeats),
        "stream": handed_us(asked.streamed, asynchronous=False),
        "astream": handed_us(asked.streamed, asynchronous=True),
    }
    found = {name: summary(values) if values else None for name, values in samples.items()}
    print("| microseconds a token | median | p99 | largest |\n|---|---|---|---|")
    for name, one in found.items():
        cells = ["–"] * 3 if one is None else [f"{value:.1f}" for value in one.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    if asked.output is not None:
        document = {
            "benchmark": "handover",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", "benchmarks/handover.py", *sys.argv[1:]]),
            "software": versions().model_dump(),
            "device": device_of(detect()).model_dump(),
            "us_a_token": found,
        }
        write_bytes(f"{json.dumps(document, indent=1)}\n".encode(), asked.output)


if __name__ == "__main__":
    main()
