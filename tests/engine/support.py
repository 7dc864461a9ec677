"""What the engine's tests share."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, FakeFactory
from molmo_edge.interface import Turn

# Options of a request that only its consumer ends.
FOREVER: dict[str, Any] = {"ignore_eos": True, "max_tokens": 10**6}
WORDS = "one two three four five six seven eight nine ten"


@contextmanager
def opened(fake: FakeFactory, **settings: Any) -> Iterator[EdgeVLM]:
    """An EdgeVLM over the fake; whatever it holds is let go before it is closed."""
    vlm = EdgeVLM(engine=fake, **settings)
    try:
        yield vlm
    finally:
        for hold in fake.holds.values():
            hold.set()
        vlm.close()


def echo(turns: Sequence[Turn]) -> str:
    """An answer that only this question has."""
    return f"{turns[-1].text} {WORDS}"


def assert_each_ended_once(engine: FakeEngine) -> None:
    """Every request that the engine took was either finished by it or aborted, and only once."""
    assert sorted(engine.finished + engine.aborted) == sorted(engine.added)
    assert engine.running == []


def eventually(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Waits for another thread to get there."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


def in_threads(functions: Sequence[Callable[[], object]]) -> None:
    """Runs each in a thread of its own; raises the first thing that any of them raised."""
    errors: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def run_script(script: str, timeout: float = 40.0) -> subprocess.CompletedProcess[str]:
    """Runs a script in an interpreter of its own; a hang is a failure."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
