"""Helpers of the engine's tests."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeFactory
from molmo_edge.interface import Turn

T = TypeVar("T")
# Options of a request that only its consumer ends.
FOREVER: dict[str, Any] = {"ignore_eos": True, "max_tokens": 10**6}
WORDS = "one two three four five six seven eight nine ten"


@contextmanager
def opened(fake: FakeFactory, **settings: Any) -> Iterator[EdgeVLM]:
    """An EdgeVLM over the fake; all holds are released before it is closed."""
    vlm = EdgeVLM(engine=fake, **settings)
    try:
        yield vlm
    finally:
        for hold in fake.holds.values():
            hold.set()
        vlm.close()


def echo(turns: Sequence[Turn]) -> str:
    """An answer that is different for each question."""
    return f"{turns[-1].text} {WORDS}"


def assert_all_ended(vlm: EdgeVLM, fake: FakeFactory) -> None:
    """Every request was finished or aborted once, none is left, and the next one is answered."""
    eventually(lambda: not fake.engine.running and vlm._loop._in_flight == 0)
    assert vlm.query(None, "next").text == f"next {WORDS}"
    for engine in fake.engines:
        assert sorted(engine.finished + engine.aborted) == sorted(engine.added)


def eventually(condition: Callable[[], object], timeout: float = 20.0) -> None:
    """Wait for another thread."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.001)


def in_threads(functions: Sequence[Callable[[], object]]) -> None:
    """Run each function in its own thread; raise the first exception of any."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
    for future in futures:
        future.result()


@contextmanager
def meanwhile(function: Callable[[], T]) -> Iterator[Future[T]]:
    """Run a function in a thread during the block; the future has its result or error."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function)


def run_script(script: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a script in its own interpreter; a hang is a failure."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
