"""The few threads in which asyncio callers' requests are rendered; a burst of them shares these."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from molmo_edge.engine.runner import timed_out
from molmo_edge.errors import EngineClosedError

T = TypeVar("T")
_THREADS = 4
_Jobs: TypeAlias = "queue.SimpleQueue[Callable[[], None] | None]"


class RenderPool:
    """Runs functions off the event loop.

    Its threads start when first needed and are daemons: unlike a ThreadPoolExecutor's they never
    hold up the interpreter's exit.
    """

    def __init__(self) -> None:
        self._jobs: _Jobs = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        # The threads hold the queue alone, so a pool that nobody holds ends them.
        self._end = weakref.finalize(self, _end, self._jobs)

    async def run(self, function: Callable[[], T], timeout: float | None) -> T:
        """What `function` returns or raises; skipped, or its outcome dropped, when the task is
        cancelled.

        Raises:
            RequestTimeout: `timeout` seconds passed first.
            EngineClosedError: the pool is closed.
        """
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Callable[[], T]] = loop.create_future()
        with self._lock:
            if self._closed:
                raise EngineClosedError("The engine is closed; an engine cannot be reopened.")
            if len(self._threads) < _THREADS:
                name = f"molmo-edge-render-{len(self._threads)}"
                thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
            self._jobs.put(_job(loop, outcome, function))
        try:
            async with asyncio.timeout(timeout):
                settled = await outcome
        except TimeoutError:
            raise timed_out() from None
        return settled()

    def close(self, timeout: float | None = None) -> None:
        """Ends the threads behind what they have to do, and waits for them up to `timeout`."""
        with self._lock:
            self._closed = True
        self._end()
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(None if end is None else max(0.0, end - time.monotonic()))


def _job(
    loop: asyncio.AbstractEventLoop,
    outcome: asyncio.Future[Callable[[], T]],
    function: Callable[[], T],
) -> Callable[[], None]:
    def settle(how: Callable[[], T]) -> None:
        if not outcome.done():
            outcome.set_result(how)

    def job() -> None:
        if outcome.cancelled():
            return
        how = _outcome(function)
        # The event loop may have been closed meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, how)

    return job


def _outcome(function: Callable[[], T]) -> Callable[[], T]:
    try:
        value = function()
    except BaseException as exc:
        error = exc

        def fail() -> T:
            raise error

        return fail
    return lambda: value


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job


def _end(jobs: _Jobs) -> None:
    for _ in range(_THREADS):
        jobs.put(None)
