"""The one thread that owns an engine, from its building to its end.

Everybody else talks to it through a queue that needs no lock, so that a garbage collector running
anywhere may cancel. The loop knows nothing of prompts, pictures or vLLM.

States: NEW → STARTING → READY → CLOSING → CLOSED; DEAD after a failed start or step, with `cause`;
READY shows as STALLED while one step lasts longer than `stall_s`.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

from molmo_edge.engine.errors_map import advice
from molmo_edge.engine.gate import Gate
from molmo_edge.engine.runner import Command, Runner, timed_out
from molmo_edge.engine.seam import Engine
from molmo_edge.engine.ticket import Ticket
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

logger = logging.getLogger("molmo_edge")
T = TypeVar("T")

# How long interpreter exit waits for an engine that nobody closed.
_EXIT_S = 5.0


class State(StrEnum):
    """Where an engine stands; see the module's docstring."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    STALLED = "stalled"
    CLOSING = "closing"
    CLOSED = "closed"
    DEAD = "dead"


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
        self._stall_s = stall_s
        self._pid = os.getpid()
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._over: queue.SimpleQueue[None] = queue.SimpleQueue()
        # Guards what follows, up to the blank line.
        self._gate = Gate()
        self._state = State.NEW
        self._cause: BaseException | None = None
        self._in_flight = 0
        self._drain = False
        self._gone = False

        self._runner: Runner | None = None
        self._thread = threading.Thread(target=self._run, name="molmo-edge-engine", daemon=True)
        self._watchdog = threading.Thread(
            target=self._watch, name="molmo-edge-watchdog", daemon=True
        )

    # Any thread.

    @property
    def state(self) -> State:
        """Where the engine stands now."""
        state = self._state
        return State.STALLED if state is State.READY and self._stalled() else state

    @property
    def cause(self) -> BaseException | None:
        """What killed the engine, or what it hangs in; None unless DEAD or STALLED."""
        if self.state is State.STALLED:
            return EngineError(
                f"One engine step has lasted longer than {self._stall_s:g} s; it may be stuck."
            )
        return self._cause

    @property
    def engine(self) -> Engine:
        """The engine, for `render` and `info` alone. Raises as `submit` when it is not up."""
        self._check()
        engine = None if self._runner is None else self._runner.engine
        if engine is None:  # it ended meanwhile
            self._check()
            raise EngineClosedError("The engine is closed; an engine cannot be reopened.")
        return engine

    def start(self) -> None:
        """Builds the engine and waits until it is up.

        Raises:
            MolmoEdgeError: what the factory raised, when it is one of ours.
            EngineStartError: any other failure, chained.
            EngineClosedError: `close()` came in between.
        """
        with self._gate.lock:
            if self._state is not State.NEW:
                raise EngineClosedError("An engine loop starts once; build a new one.")
            self._state = State.STARTING
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
        self._gate.wait_for(lambda: self._state is not State.STARTING)
        # Behind whatever the engine's own modules registered, so that at exit it is first.
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        if self._state is State.DEAD and self._runner is None:
            assert self._cause is not None
            self.close(timeout=_EXIT_S)
            if isinstance(self._cause, MolmoEdgeError):
                raise self._cause
            raise EngineStartError(
                f"The engine could not be built: {type(self._cause).__name__}. "
                "The chained error says why."
            ) from self._cause
        self._check()

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
            if not self._gate.wait_for(self._has_room, left, small=True):
                raise timed_out()

    async def async_submit(self, ticket: Ticket, *, wait: bool = False) -> None:
        """`submit` without blocking the event loop."""
        while not self._submitted(ticket):
            left = self._patience(ticket, wait)
            if not await self._gate.async_wait_for(self._has_room, left, small=True):
                raise timed_out()

    def cancel(self, ticket: Ticket, error: MolmoEdgeError | None = None) -> None:
        """Ends a request early; safe from any thread, and when it has ended already."""
        if os.getpid() != self._pid:
            return
        if ticket.fail(error or RequestCancelled("The request was cancelled.")):
            self._inbox.put(lambda runner: runner.abort(ticket))

    def abandon(self, ticket: Ticket) -> None:
        """Ends a request that nobody waits for any more; takes no lock, so finalizers may call."""

        def forget(runner: Runner) -> None:
            ticket.fail(RequestCancelled("The request was dropped."))
            runner.abort(ticket)

        if os.getpid() == self._pid:
            self._inbox.put(forget)

    def abandon_engine(self) -> None:
        """Closes an engine that nobody holds any more, behind the answers still being read.

        Takes no lock, so finalizers may call.
        """
        if os.getpid() == self._pid:
            self._inbox.put(lambda runner: self._leave(drain=True))

    def call(self, function: Callable[[Any], T]) -> T:
        """Runs `function(engine)` in the engine's thread, between steps, and returns its result."""
        engine = self.engine
        if threading.current_thread() is self._thread:
            return function(engine)
        done = Gate()
        outcome: list[Callable[[], T]] = []

        def settle(how: Callable[[], T]) -> None:
            with done.lock:
                outcome.append(how)
                wakes = done.changed()
            for wake in wakes:
                wake()

        def run(runner: Runner) -> None:
            if runner.engine is None:
                return settle(lambda: _raise(self._last_word()))
            try:
                value = function(runner.engine)
            except Exception as exc:
                error = exc
                return settle(lambda: _raise(error))
            except BaseException as exc:  # the engine's end; whoever asked hears of it too
                self._cause = exc
                settle(lambda: _raise(self._last_word()))
                raise
            settle(lambda: value)

        with self._gate.lock:
            self._check()
            self._inbox.put(run)
        done.wait_for(lambda: bool(outcome))
        return outcome[0]()

    def close(self, timeout: float | None = None, *, drain: bool = False) -> bool:
        """Ends the engine; from any thread, any number of times, in any state.

        Args:
            timeout: most seconds to wait, None for as long as it takes.
            drain: let requests in flight finish first; otherwise they end with EngineClosedError.

        Returns:
            Whether the engine is gone. With False it goes as soon as its current step ends.
        """
        if os.getpid() != self._pid:
            return True
        self._leave(drain=drain)
        if threading.current_thread() is self._thread:
            return False
        if not self._gate.wait_for(lambda: self._gone, timeout):
            return False
        for thread in (self._thread, self._watchdog):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        return True

    def check_may_wait(self) -> None:
        """Raises an EngineError where waiting for an answer can never end.

        EngineForkedError in a forked child of the process that built the engine.
        """
        self._check_owner()
        if threading.current_thread() is self._thread:
            raise EngineError(
                "The engine's own thread asked it a question, and would wait for itself. Ask "
                "from another thread."
            )

    def _check_owner(self) -> None:
        if os.getpid() != self._pid:
            raise EngineForkedError(
                "This engine belongs to the parent process. Build one in the child, or start "
                'children with multiprocessing\'s "spawn" method.'
            )

    def _check(self) -> None:
        self._check_owner()
        state = self._state
        if state is State.READY:
            return
        if state is State.DEAD:
            assert self._cause is not None
            raise EngineDeadError(
                f"The engine is dead ({type(self._cause).__name__}). {advice(self._cause)}"
                "The chained error says why; restart() builds a new one."
            ) from self._cause
        if state in (State.CLOSING, State.CLOSED):
            raise EngineClosedError("The engine is closed; an engine cannot be reopened.")
        raise EngineClosedError("The engine is not up yet.")

    def _submitted(self, ticket: Ticket) -> bool:
        self._check()
        with self._gate.lock:
            self._check()
            if self._in_flight >= self._max_queue:
                return False
            self._in_flight += 1
            # Put under the lock: an ending engine empties the inbox only after its state is set.
            self._inbox.put(lambda runner: runner.add(ticket))
        return True

    def _has_room(self) -> bool:
        return self._in_flight < self._max_queue or self._state is not State.READY

    def _patience(self, ticket: Ticket, wait: bool) -> float | None:
        if ticket.deadline is not None:
            return max(0.0, ticket.deadline - time.monotonic())
        if wait:
            return None
        raise QueueFull(
            f"{self._max_queue} requests are in flight already; ask again later, give a "
            "timeout to wait for room, or raise max_queue."
        )

    def _leave(self, *, drain: bool) -> None:
        with self._gate.lock:
            if self._state in (State.STARTING, State.READY):
                self._state, self._drain = State.CLOSING, drain
            elif self._state is State.NEW:
                self._state = State.CLOSED
            self._drain = self._drain and drain
            if self._thread.ident is None:  # never started; `_run` looks at the state first
                self._state, self._gone = State.CLOSED, True
                _LIVE.discard(self)
            wakes = self._gate.changed()
        for wake in wakes:
            wake()
        self._inbox.put(_nothing)

    # The engine's thread.

    def _run(self) -> None:
        cause: BaseException | None = None
        try:
            self._build_and_serve()
        except BaseException as exc:
            cause = exc
            _drop_frames(exc)
        self._end(cause)

    def _build_and_serve(self) -> None:
        assert self._factory is not None
        if self._state is not State.STARTING:
            return
        runner = self._runner = Runner(self._factory(), self._inbox, self._retired)
        self._set(State.READY, only_from=State.STARTING)
        runner.serve(self._leaving)

    def _leaving(self, busy: bool) -> bool:
        return self._state is State.CLOSING and not (self._drain and busy)

    def _retired(self) -> None:
        with self._gate.lock:
            self._in_flight -= 1
            wakes = self._gate.changed(big=False)
        for wake in wakes:
            wake()

    def _set(self, state: State, *, only_from: State, gone: bool = False) -> None:
        with self._gate.lock:
            if self._state is only_from:
                self._state = state
            self._gone = gone
            wakes = self._gate.changed()
        for wake in wakes:
            wake()

    def _end(self, cause: BaseException | None) -> None:
        """The last thing the thread does: wakes every waiter, then frees the engine."""
        was = self._state
        if cause is None:
            self._set(State.CLOSING, only_from=State.READY)
        else:
            self._cause = cause
            # A failed start while closing is no death, only a close.
            self._set(State.DEAD, only_from=was if was is not State.CLOSING else State.DEAD)
        if self._runner is not None:
            if cause is not None:
                logger.error("The engine died: %s", type(cause).__name__, exc_info=cause)
            engine = self._runner.end(self._last_word)
            try:
                if engine is not None:
                    engine.close()
            except BaseException as exc:
                _drop_frames(exc)
                logger.warning("Closing the engine failed: %s", type(exc).__name__, exc_info=exc)
            del engine
        self._factory = None
        _LIVE.discard(self)
        self._over.put(None)
        self._set(State.CLOSED, only_from=State.CLOSING, gone=True)

    def _last_word(self) -> MolmoEdgeError:
        cause = self._cause
        if cause is None:
            return EngineClosedError("The engine was closed before the request finished.")
        error = EngineDeadError(
            f"The engine died while the request was in flight: {type(cause).__name__}. "
            f"{advice(cause)}restart() builds a new one."
        )
        error.__cause__ = cause
        return error

    # The watchdog's thread, which shares no lock with a step.

    def _stalled(self) -> bool:
        runner = self._runner
        began = None if runner is None else runner.step_began
        return began is not None and time.monotonic() - began > self._stall_s

    def _watch(self) -> None:
        reported: float | None = None
        while True:
            try:
                return self._over.get(timeout=min(1.0, self._stall_s / 4))
            except queue.Empty:
                runner = self._runner
            began = None if runner is None else runner.step_began
            if self._stalled() and began != reported:
                reported = began
                logger.error(
                    "One engine step has lasted longer than %g s; the engine may be stuck.",
                    self._stall_s,
                )


def _nothing(runner: Runner) -> None:
    """A command that only wakes the thread."""


def _raise(error: BaseException) -> Any:
    raise error


def _drop_frames(exc: BaseException) -> None:
    """Clears the local variables that a traceback keeps alive, the engine's tensors among them."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        # Without the frame that caught it, which would keep what it goes on to hold.
        if current is exc and current.__traceback__ is not None:
            current.__traceback__ = current.__traceback__.tb_next
        if current.__traceback__ is not None:
            traceback.clear_frames(current.__traceback__)
        current = current.__cause__ or current.__context__


# Engines whose threads run; held here as they are by their threads anyway.
_LIVE: set[EngineLoop] = set()


def _close_all() -> None:
    for loop in list(_LIVE):
        loop.close(timeout=_EXIT_S)


atexit.register(_close_all)
