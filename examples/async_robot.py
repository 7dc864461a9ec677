"""A 50 Hz control loop that keeps its rate while the model answers about the newest frame.

    python examples/async_robot.py --seconds 20

The camera films a red square; the built-in demo points to it, and the robot turns its head. Control
loop and questions are tasks of one event loop; camera and engine have threads of their own. Prints
how late the ticks were, first alone, then while the model answers. They share the interpreter's
lock: run a control loop that must never be late in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator

import numpy as np

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine

PERIOD_S = 1 / 50


class Robot:
    """Turns its head towards a target; angles in radians."""

    def __init__(self) -> None:
        self.target = 0.0
        self.angle = 0.0
        self.late_s: list[float] = []
        self.missed = 0
        self.answers = self.found = 0

    async def control(self) -> None:
        """Tick at fixed times, so that a late tick does not delay the next ones."""
        due = time.perf_counter()
        while True:
            due += PERIOD_S
            await asyncio.sleep(due - time.perf_counter())
            late = time.perf_counter() - due
            self.late_s.append(late)
            self.angle += 0.1 * (self.target - self.angle)
            skipped = int(late / PERIOD_S)
            self.missed += skipped
            due += skipped * PERIOD_S

    async def look(self, vlm: EdgeVLM) -> None:
        """Follow the object that the model points at."""
        async for seen in vlm.awatch(camera, point="red square", max_crops=1, max_tokens=40):
            self.answers += 1
            if seen.points is not None and seen.points.points:
                self.found += 1
                self.target = seen.points.points[0].x - 0.5


def camera() -> Iterator[np.ndarray]:
    """Yield ten frames per second of a moving red square."""
    for i in itertools.count():
        frame = np.full((480, 640, 3), 90, np.uint8)
        left = 40 + i * 7 % 500
        frame[200:280, left : left + 80] = (200, 30, 30)
        yield frame
        time.sleep(0.1)


async def measure(seconds: float, vlm: EdgeVLM | None = None) -> str:
    robot = Robot()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
            tasks.create_task(robot.control())
            if vlm is not None:
                tasks.create_task(robot.look(vlm))
    p50, p99, worst = np.percentile(robot.late_s, [50, 99, 100]) * 1000
    return (
        f"{len(robot.late_s)} ticks in {seconds:g} s, late by p50 {p50:.2f} ms, p99 {p99:.2f} ms, "
        f"max {worst:.2f} ms; {robot.missed} missed, {robot.answers} answers, {robot.found} found"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: from the settings, else the built-in demo")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--fake", action="store_true", help="scripted answers, no model")
    args = parser.parse_args()
    answer = '<points coords="1 1 300 500">red square</points>'
    engine = FakeEngine.factory(answer, step_s=0.02) if args.fake else None
    with EdgeVLM(args.model, engine=engine) as vlm:
        print("alone:          ", asyncio.run(measure(args.seconds)), flush=True)
        print("while answering:", asyncio.run(measure(args.seconds, vlm)), flush=True)


if __name__ == "__main__":
    main()
