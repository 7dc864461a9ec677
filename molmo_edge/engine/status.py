"""Where one engine stands, and what that means for whoever asks it something."""

from __future__ import annotations

import os
from enum import StrEnum

from molmo_edge.engine.gate import Gate
from molmo_edge.engine.vllm_errors import advice
from molmo_edge.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineForkedError,
    MolmoEdgeError,
)


class State(StrEnum):
    """NEW → STARTING → READY → CLOSING → CLOSED; DEAD after a failed start or step.

    READY shows as STALLED while one step lasts longer than `stall_s`.
    """

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    STALLED = "stalled"
    CLOSING = "closing"
    CLOSED = "closed"
    DEAD = "dead"


class Status:
    """What the threads of one engine share; changed with `gate.lock` held.

    Attributes:
        cause: what ended the engine, if it did not just close.
        in_flight: requests that the engine has or will have.
        drain: whether closing waits for them.
        gone: whether the engine's memory is given back.
    """

    def __init__(self) -> None:
        self.gate = Gate()
        self.state = State.NEW
        self.cause: BaseException | None = None
        self.in_flight = 0
        self.drain = False
        self.gone = False
        self._pid = os.getpid()

    @property
    def own(self) -> bool:
        """False in a forked child, where the engine's thread does not exist."""
        return os.getpid() == self._pid

    def leave(self, *, drain: bool) -> None:
        """Begins to close, unless that or worse has begun; draining must be everybody's wish."""
        with self.gate.lock:
            if self.state in (State.STARTING, State.READY):
                self.state, self.drain = State.CLOSING, drain
            self.drain = self.drain and drain
            self.gate.wake()

    def check_owner(self) -> None:
        """Raises EngineForkedError in a forked child."""
        if not self.own:
            raise EngineForkedError(
                "This engine belongs to the parent process. Build one in the child, or start "
                'children with multiprocessing\'s "spawn" method.'
            )

    def check(self) -> None:
        """Raises what a request now would meet: EngineForkedError, EngineDeadError, …"""
        self.check_owner()
        state = self.state
        if state is State.READY:
            return
        if state is State.DEAD:
            assert self.cause is not None
            raise EngineDeadError(
                f"The engine is dead ({type(self.cause).__name__}). {advice(self.cause)}"
                "The chained error says why; restart() builds a new one."
            ) from self.cause
        if state in (State.CLOSING, State.CLOSED):
            raise EngineClosedError("The engine is closed; an engine cannot be reopened.")
        raise EngineClosedError("The engine is not up yet.")

    def last_word(self) -> MolmoEdgeError:
        """The error of a request that the engine's end left unfinished."""
        if self.cause is None:
            return EngineClosedError("The engine was closed before the request finished.")
        error = EngineDeadError(
            f"The engine died while the request was in flight: {type(self.cause).__name__}. "
            f"{advice(self.cause)}restart() builds a new one."
        )
        error.__cause__ = self.cause
        return error
