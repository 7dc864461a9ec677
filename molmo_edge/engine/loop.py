"""The one thread that owns an engine, from its building to its end.

Everybody else talks to it through a queue that needs no lock, so that a garbage collector running
anywhere may cancel. The loop knows nothing of prompts, pictures or vLLM.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from molmo_edge.engine.gate import Answer
from molmo_edge.engine.pending import Ticket
from molmo_edge.engine.runner import Command, Runner, timed_out
from molmo_edge.engine.status import State, Status
from molmo_edge.engine.vllm_errors import drop_frames
from molmo_edge.engine.watchdog import Watchdog
from molmo_edge.errors import (
    EngineClosedError,
    EngineError,
    EngineStartError,
    MolmoEdgeError,
    QueueFull,
    RequestCancelled,
)
from molmo_edge.interface import Engine

__all__ = ["EngineLoop", "State"]

logger = logging.getLogger("molmo_edge")
T = TypeVar("T")

# How long interpreter exit waits for an engine that nobody closed.
_EXIT_S = 5.0


class EngineLoop:
    """Owns one engine from its building to its end; never reused, see `EdgeVLM.restart`.

    Args:
        factory: builds the engine; called once, in the loop's thread.
        max_queue: most requests in flight, running or waiting.
        stall_s: a step longer than this many seconds is reported as a stall.
    """

    def __init__(
        self, factory: Callable[[], Engine], *, max_queue: int = 256, stall_s: float = 120.0
    ) -> None:
        self._factory: Callable[[], Engine] | None = factory
        self._max_queue = max_queue
        self._status = Status()
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._runner: Runner | None = None
        self._watchdog = Watchdog(stall_s)
        self._thread = threading.Thread(target=self._run, name="molmo-edge-engine", daemon=True)

    # Any thread.

    @property
    def state(self) -> State:
        """Where the engine stands now."""
        state = self._status.state
        return State.STALLED if state is State.READY and self._watchdog.stalled else state

    @property
    def cause(self) -> BaseException | None:
        """What killed the engine, or that it hangs; None unless DEAD or STALLED."""
        if self.state is State.STALLED:
            return EngineError(self._watchdog.report)
        return self._status.cause

    @property
    def own(self) -> bool:
        """False in a forked child, where the engine's threads do not exist."""
        return self._status.own

    @property
    def engine(self) -> Engine:
        """The engine, for `render` and `info` alone. Raises as `submit` when it is not up."""
        self._status.check()
        engine = None if self._runner is None else self._runner.engine
        if engine is None:  # it ended meanwhile
            self._status.check()
            raise EngineClosedError("The engine is closed; an engine cannot be reopened.")
        return engine

    def start(self) -> None:
        """Builds the engine and waits until it is up.

        Raises:
            MolmoEdgeError: what the factory raised, when it is one of ours.
            EngineStartError: any other failure, chained.
            EngineClosedError: `close()` came in between.
        """
        status = self._status
        with status.gate.lock:
            if status.state is not State.NEW:
                raise EngineClosedError("An engine loop starts once; build a new one.")
            status.state = State.STARTING
        _LIVE.add(self)
        try:
            self._thread.start()
            self._watchdog.start()
        except RuntimeError as exc:
            self.close(timeout=0.0)
            raise EngineStartError(
                "No thread could be started for the engine: the process has too many, or is "
                "about to exit."
            ) from exc
        status.gate.wait_for(lambda: status.state is not State.STARTING)
        # Behind whatever the engine's own modules registered, so that at exit it is first.
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        if status.state is State.DEAD and self._runner is None:
            cause = status.cause
            self.close(timeout=_EXIT_S)
            if isinstance(cause, MolmoEdgeError):
                raise cause
            raise EngineStartError(
                f"The engine could not be built: {type(cause).__name__}. "
                "The chained error says why."
            ) from cause
        status.check()

    def submit(self, ticket: Ticket, *, wait: bool = False) -> None:
        """Hands a request to the engine.

        Waits for room in the queue until the request's deadline; without one not at all, or with
        `wait` as long as it takes.

        Raises:
            QueueFull, RequestTimeout, EngineDeadError, EngineClosedError, EngineForkedError.
        """
        self.check_may_wait()
        while not self._submitted(ticket):
            left = self._patience(ticket, wait)
            if not self._status.gate.wait_for(self._has_room, left, small=True):
                raise timed_out()

    async def async_submit(self, ticket: Ticket, *, wait: bool = False) -> None:
        """`submit` without blocking the event loop."""
        while not self._submitted(ticket):
            left = self._patience(ticket, wait)
            if not await self._status.gate.async_wait_for(self._has_room, left, small=True):
                raise timed_out()

    def cancel(self, ticket: Ticket, error: MolmoEdgeError | None = None) -> None:
        """Ends a request early; safe from any thread, and when it has ended already."""
        if self._status.own and ticket.fail(
            error or RequestCancelled("The request was cancelled.")
        ):
            self._inbox.put(lambda runner: runner.abort(ticket))

    def abandon(self, ticket: Ticket) -> None:
        """Ends a request that nobody waits for any more; takes no lock, so finalizers may call."""

        def forget(runner: Runner) -> None:
            ticket.fail(RequestCancelled("The request was dropped."))
            runner.abort(ticket)

        if self._status.own:
            self._inbox.put(forget)

    def abandon_engine(self) -> None:
        """Closes an engine that nobody holds any more, behind the answers still being read.

        Takes no lock, so finalizers may call.
        """
        if self._status.own:
            self._inbox.put(lambda runner: self._status.leave(drain=True))

    def call(self, function: Callable[[Any], T]) -> T:
        """Runs `function(engine)` in the engine's thread, between steps, and returns its result."""
        engine = self.engine
        if threading.current_thread() is self._thread:
            return function(engine)
        answer: Answer[T] = Answer()

        def run(runner: Runner) -> None:
            if runner.engine is None:
                answer.fail(self._status.last_word())
            else:
                answer.run(function, runner.engine)

        with self._status.gate.lock:
            self._status.check()
            self._inbox.put(run)
        return answer.get()

    def close(self, timeout: float | None = None, *, drain: bool = False) -> bool:
        """Ends the engine; from any thread, any number of times, in any state.

        Args:
            timeout: most seconds to wait, None for as long as it takes.
            drain: let requests in flight finish first; otherwise they end with EngineClosedError.

        Returns:
            Whether the engine is gone. With False it goes as soon as its current step ends.
        """
        status = self._status
        if not status.own:
            return True
        status.leave(drain=drain)
        self._inbox.put(_nothing)
        with status.gate.lock:
            if self._thread.ident is None:  # never started; `_run` looks at the state first
                status.state, status.gone = State.CLOSED, True
                _LIVE.discard(self)
        if threading.current_thread() is self._thread:
            return False
        if not status.gate.wait_for(lambda: status.gone, timeout):
            return False
        if self._thread.ident is not None:
            self._thread.join()
        self._watchdog.join()
        return True

    def check_may_wait(self) -> None:
        """Raises an EngineError where waiting for an answer can never end.

        EngineForkedError in a forked child of the process that built the engine.
        """
        self._status.check_owner()
        if threading.current_thread() is self._thread:
            raise EngineError(
                "The engine's own thread asked it a question, and would wait for itself. Ask "
                "from another thread."
            )

    def _submitted(self, ticket: Ticket) -> bool:
        status = self._status
        status.check()
        with status.gate.lock:
            status.check()
            if status.in_flight >= self._max_queue:
                return False
            status.in_flight += 1
            # Put under the lock: an ending engine empties the inbox only after its state is set.
            self._inbox.put(lambda runner: runner.add(ticket))
        return True

    def _has_room(self) -> bool:
        status = self._status
        return status.in_flight < self._max_queue or status.state is not State.READY

    def _patience(self, ticket: Ticket, wait: bool) -> float | None:
        if ticket.deadline is not None:
            return max(0.0, ticket.deadline - time.monotonic())
        if wait:
            return None
        raise QueueFull(
            f"{self._max_queue} requests are in flight already; ask again later, give a "
            "timeout to wait for room, or raise max_queue."
        )

    # The engine's thread.

    def _run(self) -> None:
        cause: BaseException | None = None
        try:
            self._build_and_serve()
        except BaseException as exc:
            cause = exc
            drop_frames(exc)
        self._end(cause)

    def _build_and_serve(self) -> None:
        status = self._status
        if status.state is not State.STARTING:
            return
        assert self._factory is not None
        self._runner = Runner(self._factory(), self._inbox, self._watchdog, self._retired)
        with status.gate.lock:
            if status.state is State.STARTING:
                status.state = State.READY
            status.gate.wake()
        self._runner.serve(
            lambda busy: status.state is State.CLOSING and not (status.drain and busy)
        )

    def _retired(self) -> None:
        with self._status.gate.lock:
            self._status.in_flight -= 1
            self._status.gate.wake(big=False)

    def _end(self, cause: BaseException | None) -> None:
        """The last thing the thread does: wakes every waiter, then frees the engine."""
        status = self._status
        with status.gate.lock:
            status.cause = cause
            if status.state in (State.STARTING, State.READY):
                status.state = State.CLOSING if cause is None else State.DEAD
            status.gate.wake()
        if self._runner is not None:
            if cause is not None:
                logger.error("The engine died: %s", type(cause).__name__, exc_info=cause)
            engine = self._runner.end(status.last_word)
            try:
                if engine is not None:
                    engine.close()
            except BaseException as exc:
                drop_frames(exc)
                logger.warning("Closing the engine failed: %s", type(exc).__name__, exc_info=exc)
        self._factory = None
        _LIVE.discard(self)
        self._watchdog.stop()
        with status.gate.lock:
            if status.state is State.CLOSING:
                status.state = State.CLOSED
            status.gone = True
            status.gate.wake()


def _nothing(runner: Runner) -> None:
    """A command that only wakes the thread."""


# Engines whose threads run; their threads hold them anyway.
_LIVE: set[EngineLoop] = set()


def _close_all() -> None:
    for loop in list(_LIVE):
        loop.close(timeout=_EXIT_S)


atexit.register(_close_all)
