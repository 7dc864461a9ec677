"""The one thread that owns an engine, from its construction to its end.

All other threads talk to it through a queue that needs no lock, so that a finalizer running
anywhere may cancel. The loop knows nothing about prompts, images or vLLM.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

from molmo_edge.engine.pending import PendingRequest, Waiters, timed_out
from molmo_edge.engine.vllm_errors import advice, drop_frames, mapped
from molmo_edge.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineForkedError,
    EngineStartError,
    MolmoEdgeError,
    QueueFull,
    RequestCancelled,
)
from molmo_edge.interface import Engine

logger = logging.getLogger("molmo_edge")
T = TypeVar("T")

# Seconds that interpreter exit waits for an engine that nobody closed.
_EXIT_S = 5.0
_CLOSED = "The engine is closed; an engine cannot be reopened."
_NOT_READY = "The engine is not ready yet."


class State(StrEnum):
    """STARTING → READY → CLOSING → CLOSED; DEAD after a failed start or step.

    READY shows as STALLED while requests wait for longer than `stall_s` for any of them to go on.
    """

    STARTING = "starting"
    READY = "ready"
    STALLED = "stalled"
    CLOSING = "closing"
    CLOSED = "closed"
    DEAD = "dead"


class EngineLoop:
    """Owns one engine; never reused, see `EdgeVLM.restart`.

    Args:
        factory: builds the engine; called once, in the loop's thread.
        max_queue: maximum number of requests in flight, running or waiting.
        stall_s: requests without a token for this many seconds are a stall.
    """

    def __init__(
        self, factory: Callable[[], Engine], *, max_queue: int = 256, stall_s: float = 120.0
    ) -> None:
        self._factory = factory
        self._max_queue = max_queue
        self._stall_s = stall_s
        self._pid = os.getpid()
        # Guards what follows; reentrant, since a finalizer may run while it is held.
        self._lock = threading.RLock()
        self._state = State.STARTING
        self.cause: BaseException | None = None  # what killed the engine
        self._drain = False
        self._gone = False  # the engine's memory is freed
        self._in_flight = 0  # requests that the engine has or will have
        self.changed = Waiters()  # for one of the above to change
        self._engine: Engine | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._active: dict[str, PendingRequest] = {}  # the engine thread's alone
        self._quiet_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="molmo-edge-engine", daemon=True)

    # Any thread.

    @property
    def state(self) -> State:
        """State of the engine now."""
        since = self._quiet_since
        stalled = since is not None and time.monotonic() - since > self._stall_s
        return State.STALLED if stalled and self._state is State.READY else self._state

    @property
    def engine(self) -> Engine:
        """The engine, for `info` and what may run beside its steps. Raises as `check`."""
        engine = self._engine
        self.check()
        if engine is None:  # it became ready between the two lines
            raise EngineClosedError(_NOT_READY)
        return engine

    def check(self) -> None:
        """Raise what a request submitted now would get: EngineDeadError, EngineClosedError, …"""
        self._check_owner()
        state = self._state
        if state is State.DEAD:
            raise self._end_error()
        if state is not State.READY:
            raise EngineClosedError(_NOT_READY if state is State.STARTING else _CLOSED)

    def check_may_wait(self) -> None:
        """Raise an EngineError in the engine's own thread and in a forked child."""
        self._check_owner()
        if threading.current_thread() is self._thread:
            raise EngineError(
                "The engine's own thread cannot wait for an answer that it has to generate itself. "
                "Call from another thread."
            )

    def start(self) -> None:
        """Build the engine and wait until it is ready.

        Raises:
            MolmoEdgeError: what the factory raised, when it is one of ours.
            EngineStartError: any other failure, chained.
            EngineClosedError: `close()` was called meanwhile.
        """
        with self._lock:
            if self._state is not State.STARTING:
                raise EngineClosedError(_CLOSED)
            _LIVE.add(self)
            try:
                self._thread.start()
            except RuntimeError as exc:
                _LIVE.discard(self)
                raise EngineStartError("The system has no thread left for the engine.") from exc
        self.changed.wait(lambda: self._state is not State.STARTING)
        # After whatever the engine's own modules registered, so that at exit it runs first.
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        if self.state is State.DEAD:
            if isinstance(self.cause, MolmoEdgeError):
                raise self.cause
            raise EngineStartError(
                f"The engine could not be built: {type(self.cause).__name__}. The chained error "
                "says why."
            ) from self.cause
        self.check()

    def submit(self, request: PendingRequest, *, wait: bool = False) -> None:
        """Hand a request to the engine.

        Waits for room until its deadline; without one not at all, or with `wait` without limit.

        Raises:
            QueueFull, RequestTimeout, EngineDeadError, EngineClosedError, EngineForkedError.
        """
        self.check_may_wait()
        while not self._try_submit(request, wait):
            if not self.changed.wait(self._may_submit, request.left_s()):
                raise timed_out()

    async def async_submit(self, request: PendingRequest, *, wait: bool = False) -> None:
        """`submit` without blocking the event loop."""
        self.check_may_wait()
        while not self._try_submit(request, wait):
            if not await self.changed.async_wait(self._may_submit, request.left_s()):
                raise timed_out()

    def cancel(self, request: PendingRequest, error: MolmoEdgeError | None = None) -> None:
        """End a request early; from any thread, also when it has ended already."""
        error = error or RequestCancelled("The request was cancelled.")
        if self._is_owner() and request.fail(error):
            self._inbox.put(lambda: self._abort(request))

    def abandon(self, request: PendingRequest) -> None:
        """End a request that nobody waits for any more; takes no lock, so finalizers may call."""
        if self._is_owner():
            self._inbox.put(lambda: self.cancel(request))

    def abandon_engine(self) -> None:
        """Close, as `abandon` does, after the answers still being read."""
        if self._is_owner():
            self._inbox.put(lambda: self._leave(drain=True))

    def call(self, function: Callable[[Any], T]) -> T:
        """Run `function(engine)` in the engine's thread, between steps, and return its result."""
        engine = self.engine
        if threading.current_thread() is self._thread:
            return function(engine)
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                if self._engine is None:
                    raise self._end_error()
                results.append(function(self._engine))
            except BaseException as exc:
                errors.append(exc)
            self.changed.wake()

        with self._lock:
            self.check()
            self._inbox.put(run)
        self.changed.wait(lambda: bool(results or errors))
        if errors:
            error = errors.pop()
            if type(error).__module__.startswith("vllm."):
                raise EngineError(
                    f"vLLM failed the call: {type(error).__name__}. The chained error says why."
                ) from error
            raise error
        return results.pop()

    def close(self, timeout: float | None = None, *, drain: bool = False) -> bool:
        """End the engine; from any thread, any number of times, in any state. See `EdgeVLM`."""
        if not self._is_owner():
            return True
        self._leave(drain=drain)
        self._inbox.put(lambda: None)  # wakes the thread
        if threading.current_thread() is self._thread:
            return False
        return self.changed.wait(lambda: self._gone, timeout)

    async def async_gone(self) -> None:
        """Wait for the end that `close` began."""
        await self.changed.async_wait(lambda: self._gone)

    def _is_owner(self) -> bool:
        """False in a forked child, where the engine's thread does not exist."""
        return os.getpid() == self._pid

    def _check_owner(self) -> None:
        if not self._is_owner():
            raise EngineForkedError(
                "This engine belongs to the parent process. Start children with "
                'multiprocessing\'s "spawn" method, or build one in the child with '
                'engine="process".'
            )

    def _leave(self, *, drain: bool) -> None:
        """Begin to close, unless that or worse has begun; draining takes every caller's consent."""
        with self._lock:
            if self._state in (State.STARTING, State.READY):
                self._state, self._drain = State.CLOSING, drain
            self._drain = self._drain and drain
            if self._thread.ident is None:  # never started; `_run` looks at the state first
                self._state, self._gone = State.CLOSED, True
        self.changed.wake()

    def _try_submit(self, request: PendingRequest, wait: bool) -> bool:
        self._check_owner()  # before the lock, which a forked child may have inherited locked
        with self._lock:
            self.check()
            if self._in_flight < self._max_queue:
                self._in_flight += 1
                # Under the lock: an ending engine empties the inbox only after its state is set.
                self._inbox.put(lambda: self._add(request))
                return True
        if wait or request.options.deadline is not None:
            return False
        raise QueueFull(
            f"{self._max_queue} requests are in flight already; try again later, give a timeout to "
            "wait for room, or raise max_queue."
        )

    def _may_submit(self) -> bool:
        return self._in_flight < self._max_queue or self._state is not State.READY

    def _end_error(self) -> MolmoEdgeError:
        """The error of whatever the engine's end leaves unanswered."""
        if self.cause is None:
            return EngineClosedError("The engine was closed before the request finished.")
        error = EngineDeadError(
            f"The engine died: {type(self.cause).__name__}. {advice(self.cause)}"
            "The chained error says why; restart() builds a new one."
        )
        error.__cause__ = self.cause
        return error

    # The engine's thread.

    def _run(self) -> None:
        cause: BaseException | None = None
        try:
            if self._state is State.STARTING:
                self._engine = self._factory()
                with self._lock:
                    if self._state is State.STARTING:
                        self._state = State.READY
                self.changed.wake()
                self._serve()
        except BaseException as exc:
            cause = exc
            drop_frames(exc)
        self._end(cause)

    def _serve(self) -> None:
        """Run commands between steps, and steps while there are requests, until closing."""
        while True:
            if not self._active and self._state is not State.CLOSING:
                self._quiet_since = None
                self._inbox.get()()  # `close` puts a command after setting the state
            self._run_commands()
            if self._state is State.CLOSING and not (self._drain and self._active):
                return
            if self._active:
                self._step()

    def _run_commands(self) -> None:
        # Nobody else takes from the inbox, so what is there stays there.
        while not self._inbox.empty():
            self._inbox.get_nowait()()

    def _step(self) -> None:
        assert self._engine is not None
        self._quiet_since = self._quiet_since or time.monotonic()
        updates = self._engine.step()
        if updates:
            self._quiet_since = None
        now = time.monotonic()
        for update in updates:
            request = self._active.get(update.request_id)
            if request is not None:
                request.feed(update, now)
                if update.finish_reason is not None:
                    self._retire(request)
        for request in tuple(self._active.values()):
            request.expire(now)
            if request.done:  # also if Ctrl-C kept its consumer from sending the command
                self._abort(request)

    def _add(self, request: PendingRequest) -> None:
        """Hand a request to the engine, unless it has ended already."""
        self._active[request.request_id] = request
        if self._engine is None:
            return  # `_end` fails it
        request.expire(time.monotonic())
        if request.rendered is None:
            self._retire(request)
            return
        try:
            with mapped("add"):
                self._engine.add(request.request_id, request.rendered, request.options)
        except MolmoEdgeError as exc:
            request.fail(exc)
            self._retire(request)
        else:
            request.accept()

    def _abort(self, request: PendingRequest) -> None:
        """Take a request that has ended out of the engine, if it is still there."""
        if request.request_id in self._active:
            if self._engine is not None:
                self._engine.abort([request.request_id])
            self._retire(request)

    def _retire(self, request: PendingRequest) -> None:
        if self._active.pop(request.request_id, None) is not None:
            with self._lock:
                self._in_flight -= 1
            self.changed.wake()

    def _end(self, cause: BaseException | None) -> None:
        """The last thing the thread does: wake every waiter, then free the engine."""
        with self._lock:
            self.cause = cause
            if self._state in (State.STARTING, State.READY):
                self._state = State.CLOSING if cause is None else State.DEAD
        self.changed.wake()
        engine, self._engine = self._engine, None
        if engine is not None:
            self._run_commands()
            for request in list(self._active.values()):
                request.fail(self._end_error())
                self._retire(request)
            if cause is not None:  # after the waiters, which a log handler must not hold up
                logger.error("The engine died: %s", type(cause).__name__, exc_info=cause)
            try:
                engine.close()
            except BaseException as exc:
                drop_frames(exc)
                logger.warning("Closing the engine failed: %s", type(exc).__name__, exc_info=exc)
        _LIVE.discard(self)
        with self._lock:
            if self._state is State.CLOSING:
                self._state = State.CLOSED
            self._gone = True
        self.changed.wake()


# Engines whose threads run; their threads hold them anyway.
_LIVE: set[EngineLoop] = set()


def _close_all() -> None:
    for loop in list(_LIVE):
        loop.close(timeout=_EXIT_S)


atexit.register(_close_all)
