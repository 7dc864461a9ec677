"""The one thread that builds an engine, steps it, and aborts in it.

Everybody else talks to it through a queue that needs no lock, so that a garbage collector running
anywhere may cancel. The loop knows nothing of prompts, pictures or vLLM.

States: NEW → STARTING → READY → CLOSING → CLOSED; DEAD after a failed start or step, with `cause`;
READY shows as STALLED while one step lasts longer than `stall_s`.
"""

from __future__ import annotations

import atexit
import heapq
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum
from typing import Any, TypeVar

from molmo_edge.engine.seam import Engine
from molmo_edge.engine.ticket import Ticket
from molmo_edge.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineForkedError,
    EngineStartError,
    GenerationError,
    MolmoEdgeError,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
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
        self._inbox: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._lock = threading.Condition(threading.Lock())
        self._state = State.NEW
        self._cause: BaseException | None = None
        self._in_flight = 0
        self._drain = False
        self._closing = threading.Event()
        self._ended = threading.Event()
        # Engine thread only.
        self._active: dict[str, Ticket] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._ending = False
        # Written by the engine thread, read by the watchdog without a lock.
        self._step_began: float | None = None
        self._engine: Engine | None = None
        self._thread = threading.Thread(target=self._run, name="molmo-edge-engine", daemon=True)
        self._watchdog = threading.Thread(
            target=self._watch, name="molmo-edge-watchdog", daemon=True
        )

    # Any thread.

    @property
    def state(self) -> State:
        """Where the engine stands now."""
        if self._state is State.READY and self._stalled():
            return State.STALLED
        return self._state

    @property
    def cause(self) -> BaseException | None:
        """What killed the engine, None unless DEAD."""
        return self._cause

    @property
    def engine(self) -> Engine:
        """The engine, for `render` and `info` alone. Raises as `submit` when it is not up."""
        self._check()
        assert self._engine is not None
        return self._engine

    def start(self) -> None:
        """Builds the engine and waits until it is up.

        Raises:
            MolmoEdgeError: what the factory raised, when it is one of ours.
            EngineStartError: any other failure, chained.
            EngineClosedError: `close()` came in between.
        """
        with self._lock:
            if self._state is not State.NEW:
                raise EngineClosedError("An engine loop starts once; build a new one.")
            self._state = State.STARTING
        _LIVE.add(self)
        self._thread.start()
        self._watchdog.start()
        with self._lock:
            self._lock.wait_for(lambda: self._state is not State.STARTING)
        if self._state is State.DEAD:
            assert self._cause is not None
            if isinstance(self._cause, MolmoEdgeError):
                raise self._cause
            raise EngineStartError(
                f"The engine could not be built: {type(self._cause).__name__}. "
                "The chained error says why."
            ) from self._cause
        self._check()

    def submit(self, ticket: Ticket, *, wait_s: float | None = 0.0) -> Ticket:
        """Hands a request to the engine.

        Waits up to `wait_s` seconds for room in the queue (None: as long as it takes).

        Raises:
            QueueFull, EngineDeadError, EngineClosedError, EngineForkedError.
        """
        self._check()
        with self._lock:
            room = self._lock.wait_for(
                lambda: self._in_flight < self._max_queue or self._state is not State.READY, wait_s
            )
            self._check()
            if not room:
                raise QueueFull(
                    f"{self._max_queue} requests are in flight already; ask again later, give a "
                    "timeout to wait for room, or raise max_queue."
                )
            self._in_flight += 1
            # Put under the lock: a dying loop empties the queue only after its state is set.
            self._inbox.put(lambda engine: self._add(engine, ticket))
        return ticket

    def cancel(self, ticket: Ticket, error: MolmoEdgeError | None = None) -> None:
        """Ends a request early; safe from any thread, and when it has ended already."""
        if os.getpid() != self._pid:
            return
        if ticket.fail(error or RequestCancelled("The request was cancelled.")):
            self._inbox.put(lambda engine: self._abort(engine, ticket))

    def abandon(self, ticket: Ticket) -> None:
        """Ends a request that nobody waits for any more; takes no lock, so finalizers may call."""

        def forget(engine: Engine) -> None:
            ticket.fail(RequestCancelled("The request was dropped."))
            self._abort(engine, ticket)

        if os.getpid() == self._pid:
            self._inbox.put(forget)

    def abandon_engine(self) -> None:
        """Closes an engine that nobody holds any more; takes no lock, so finalizers may call."""

        def forget(engine: Engine) -> None:
            with self._lock:
                if self._state is State.READY:
                    self._state = State.CLOSING

        if os.getpid() == self._pid:
            self._inbox.put(forget)

    def call(self, function: Callable[[Engine], T]) -> T:
        """Runs `function(engine)` in the engine's thread, between steps, and returns its result."""
        self._check()
        future: Future[T] = Future()

        def run(engine: Engine) -> None:
            try:
                future.set_result(function(engine))
            except Exception as exc:
                future.set_exception(exc)

        with self._lock:
            self._check()
            self._inbox.put(run)
        while True:
            try:
                return future.result(timeout=0.2)
            except TimeoutError:
                if future.done():
                    raise
                if self._ended.is_set():
                    self._check()

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
        with self._lock:
            if self._state is State.NEW:
                self._state = State.CLOSED
                self._ended.set()
            elif self._state in (State.STARTING, State.READY):
                self._state = State.CLOSING
                self._drain = drain
            self._drain = self._drain and drain
            self._lock.notify_all()
        self._closing.set()
        self._inbox.put(_wake)
        if threading.current_thread() is self._thread:
            return False
        if not self._ended.wait(timeout):
            return False
        for thread in (self._thread, self._watchdog):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(timeout)
        return True

    def check_owner(self) -> None:
        """Raises EngineForkedError in a forked child of the process that built the engine."""
        if os.getpid() != self._pid:
            raise EngineForkedError(
                "This engine belongs to the parent process. Build one in the child, or start "
                'children with multiprocessing\'s "spawn" method.'
            )

    def _check(self) -> None:
        self.check_owner()
        state = self._state
        if state is State.READY:
            return
        if state is State.DEAD:
            raise EngineDeadError(
                f"The engine is dead ({type(self._cause).__name__}). The chained error says why; "
                "restart() builds a new one."
            ) from self._cause
        if state in (State.CLOSING, State.CLOSED):
            raise EngineClosedError("The engine is closed; an engine cannot be reopened.")
        raise EngineClosedError("The engine is not up yet.")

    # The engine's thread.

    def _run(self) -> None:
        engine: Engine | None = None
        cause: BaseException | None = None
        try:
            assert self._factory is not None
            engine = self._engine = self._factory()
            with self._lock:
                if self._state is State.STARTING:
                    self._state = State.READY
                self._lock.notify_all()
            self._serve(engine)
        except BaseException as exc:
            cause = exc
        finally:
            self._end(engine, cause)

    def _serve(self, engine: Engine) -> None:
        while True:
            self._obey(engine)
            if self._state is State.CLOSING and not (self._drain and self._active):
                return
            if not self._active:
                continue
            self._step_began = time.monotonic()
            updates = engine.step()
            self._step_began = None
            for update in updates:
                ticket = self._active.get(update.request_id)
                if ticket is None:
                    continue
                ticket.feed(update)
                if update.finish_reason is not None:
                    self._retire(ticket)
            self._expire(engine)

    def _obey(self, engine: Engine) -> None:
        """Carries out what waits in the inbox; sleeps there when there is nothing else to do."""
        if not self._active and self._state is not State.CLOSING:
            self._inbox.get()(engine)
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command(engine)

    def _add(self, engine: Engine, ticket: Ticket) -> None:
        self._active[ticket.request_id] = ticket
        if self._ending:
            return
        rendered = ticket.rendered
        if ticket.done or rendered is None:
            self._retire(ticket)
            return
        try:
            engine.add(ticket.request_id, rendered, ticket.sampling)
        except MolmoEdgeError as exc:
            ticket.fail(exc)
            self._retire(ticket)
        except Exception as exc:
            error = GenerationError(
                f"The engine refused the request: {type(exc).__name__}. The chained error says why."
            )
            error.__cause__ = exc
            ticket.fail(error)
            self._retire(ticket)
        else:
            ticket.taken()
            if ticket.deadline is not None:
                heapq.heappush(self._deadlines, (ticket.deadline, ticket.request_id))

    def _abort(self, engine: Engine, ticket: Ticket) -> None:
        if ticket.request_id in self._active:
            if not self._ending:
                engine.abort([ticket.request_id])
            self._retire(ticket)

    def _expire(self, engine: Engine) -> None:
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            ticket = self._active.get(heapq.heappop(self._deadlines)[1])
            if ticket is not None:
                ticket.fail(timed_out())
                self._abort(engine, ticket)

    def _retire(self, ticket: Ticket) -> None:
        if self._active.pop(ticket.request_id, None) is not None:
            with self._lock:
                self._in_flight -= 1
                self._lock.notify_all()

    def _end(self, engine: Engine | None, cause: BaseException | None) -> None:
        """The last thing the thread does: wakes every waiter, then frees the engine."""
        with self._lock:
            if cause is not None and self._state is not State.CLOSING:
                self._state = State.DEAD
                self._cause = cause
            else:
                self._state = State.CLOSING
            self._lock.notify_all()
        if cause is not None:
            logger.error("The engine died: %s", type(cause).__name__, exc_info=cause)
        self._step_began = None
        # Requests still in the inbox become active, and so end like the others.
        self._ending = True
        refusing: Any = _Refusing(lambda: self._last_word(cause))
        while True:
            try:
                self._inbox.get_nowait()(refusing)
            except queue.Empty:
                break
        for ticket in list(self._active.values()):
            ticket.fail(self._last_word(cause))
            self._retire(ticket)
        if engine is not None:
            try:
                engine.close()
            except Exception as exc:
                logger.warning("Closing the engine failed: %s", type(exc).__name__, exc_info=exc)
        # Nothing may keep the engine's memory: neither this loop, nor the frames of the cause.
        self._engine = self._factory = None
        if cause is not None:
            _drop_frames(cause)
        with self._lock:
            if self._state is State.CLOSING:
                self._state = State.CLOSED
            self._lock.notify_all()
        self._closing.set()
        self._ended.set()

    def _last_word(self, cause: BaseException | None) -> MolmoEdgeError:
        if cause is None or self._state is not State.DEAD:
            return EngineClosedError("The engine was closed before the request finished.")
        error = EngineDeadError(
            f"The engine died while the request was in flight: {type(cause).__name__}."
        )
        error.__cause__ = cause
        return error

    # The watchdog's thread.

    def _stalled(self) -> bool:
        began = self._step_began
        return began is not None and time.monotonic() - began > self._stall_s

    def _watch(self) -> None:
        reported: float | None = None
        while not self._closing.wait(min(1.0, self._stall_s / 4)):
            began = self._step_began
            if self._stalled() and began != reported:
                reported = began
                logger.error(
                    "One engine step has lasted longer than %.1f s; the engine may be stuck.",
                    self._stall_s,
                )


class _Refusing:
    """Stands in for an engine that is gone, so that late commands end like everything else."""

    def __init__(self, error: Callable[[], MolmoEdgeError]) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error()


def _wake(engine: Engine) -> None:
    """A command that only wakes the loop."""


def _drop_frames(exc: BaseException) -> None:
    """Clears the local variables that a traceback keeps alive, the engine's tensors among them."""
    import traceback

    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if current.__traceback__ is not None:
            traceback.clear_frames(current.__traceback__)
        current = current.__cause__ or current.__context__


def timed_out() -> RequestTimeout:
    """The error of a request whose deadline passed."""
    return RequestTimeout("The request's deadline passed; `.partial` holds what was generated.")


_LIVE: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


def _close_all() -> None:
    for loop in list(_LIVE):
        loop.close(timeout=_EXIT_S)


atexit.register(_close_all)
