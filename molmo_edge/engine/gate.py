"""A lock and the waiters for what it guards, for threads and for asyncio alike.

`threading.Condition`, and with it Event, Future and Semaphore, can stay locked for good when Ctrl-C
arrives inside one of its methods; ``with`` on a plain lock cannot, so this is built on those.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Wake = Callable[[], None]
T = TypeVar("T")


class Gate:
    """Guards some state; whoever changes it wakes those who wait for it.

    A change is small or big. Big ones (an end) wake everybody, small ones (a word of an answer)
    only who asked for each: waking costs a switch of the interpreter lock.
    """

    def __init__(self) -> None:
        # Reentrant: a finalizer may run anywhere, and cancel what this thread is busy with.
        self.lock = threading.RLock()
        self._for_small: dict[Wake, bool] = {}
        self._for_big: dict[Wake, bool] = {}

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return len(self._for_small) + len(self._for_big)

    def wake(self, *, big: bool = True) -> None:
        """Says that something changed; called with the lock held."""
        if self._for_small:
            _wake(self._for_small)
        if big and self._for_big:
            _wake(self._for_big)

    def wait_for(
        self, ready: Callable[[], bool], timeout: float | None = None, *, small: bool = False
    ) -> bool:
        """Blocks until `ready()`, which is called with the lock held and must be quick.

        Args:
            timeout: most seconds to wait; None for as long as it takes.
            small: look at small changes too.

        Returns:
            False when the time ran out first.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            woken = threading.Lock()
            woken.acquire()
            wake = woken.release
            if not self._enter(wake, ready, small):
                return True
            try:
                left = -1.0 if end is None else end - time.monotonic()
                if end is not None and left <= 0:
                    return False
                woken.acquire(timeout=min(left, threading.TIMEOUT_MAX))
            finally:
                self._leave(wake)

    async def async_wait_for(
        self, ready: Callable[[], bool], timeout: float | None = None, *, small: bool = False
    ) -> bool:
        """`wait_for` without blocking the event loop."""
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        while True:
            woken: asyncio.Future[None] = loop.create_future()
            wake = _waker(loop, woken)
            if not self._enter(wake, ready, small):
                return True
            try:
                async with asyncio.timeout_at(end):
                    await woken
            except TimeoutError:
                with self.lock:
                    return ready()
            finally:
                self._leave(wake)

    def _enter(self, wake: Wake, ready: Callable[[], bool], small: bool) -> bool:
        with self.lock:
            if ready():
                return False
            (self._for_small if small else self._for_big)[wake] = True
            return True

    def _leave(self, wake: Wake) -> None:
        with self.lock:
            self._for_small.pop(wake, None)
            self._for_big.pop(wake, None)


def _wake(waiting: dict[Wake, bool]) -> None:
    # A finalizer may run at any of these lines, and wake some of them itself.
    for wake in list(waiting):
        if waiting.pop(wake, False):
            wake()


class Answer(Generic[T]):
    """The outcome of what another thread runs; a Future that Ctrl-C cannot leave locked."""

    def __init__(self) -> None:
        self._gate = Gate()
        self._value: list[T] = []
        self._error: BaseException | None = None

    def run(self, function: Callable[..., T], *args: object) -> None:
        """Runs it and keeps what came out; what is no `Exception` goes on to the runner too."""
        try:
            value = function(*args)
        except BaseException as exc:
            self.fail(exc)
            if not isinstance(exc, Exception):
                raise
            return
        with self._gate.lock:
            self._value.append(value)
            self._gate.wake()

    def fail(self, error: BaseException) -> None:
        """Makes `get` raise it."""
        with self._gate.lock:
            self._error = error
            self._gate.wake()

    def get(self) -> T:
        """Waits, then returns the value or raises the exception."""
        self._gate.wait_for(lambda: bool(self._value) or self._error is not None)
        if self._error is not None:
            error, self._error = self._error, None  # no cycle through its traceback
            raise error
        return self._value[0]


def _waker(loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> Wake:
    def settle() -> None:
        if not woken.done():
            woken.set_result(None)

    def wake() -> None:
        # The event loop may have been closed while the engine still generates.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle)

    return wake
