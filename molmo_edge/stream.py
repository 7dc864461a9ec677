"""`Stream`: an answer while it is being generated, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Self

from molmo_edge.engine.loop import EngineLoop, timed_out
from molmo_edge.engine.ticket import Ticket
from molmo_edge.results import Result


class Stream:
    """Iterates over text deltas, never half a character; `str` pieces that join to `Result.text`.

    Works as an iterator and as an async iterator. Leaving the loop early, dropping the stream,
    `cancel()`, a passed deadline and a cancelled task each free the sequence in the engine.

    Raises while iterating, behind the text that came first:
        RequestTimeout, RequestCancelled, GenerationError, EngineDeadError, EngineClosedError.
    """

    def __init__(self, loop: EngineLoop, ticket: Ticket) -> None:
        self._loop = loop
        self._ticket = ticket
        self._seen = 0
        self._changed: asyncio.Event | None = None
        self._finalizer = weakref.finalize(self, loop.abandon, ticket)
        # At exit the whole engine goes; one command for each stream would only slow it.
        self._finalizer.atexit = False

    @property
    def text(self) -> str:
        """What was generated so far."""
        return self._ticket.text

    @property
    def done(self) -> bool:
        """Whether the answer is complete or has failed."""
        return self._ticket.done

    def cancel(self) -> None:
        """Stops generating; the text so far stays in `text`. Does nothing when it has ended."""
        self._loop.cancel(self._ticket)

    def result(self) -> Result:
        """Waits for the end. Raises what iterating would raise."""
        while not self._ticket.done:
            self._wait(None)
        return self._result()

    @property
    def prompt_token_ids(self) -> tuple[int, ...] | None:
        """The prompt as the model got it, image tokens included; None when not known."""
        ids = self._ticket.prompt_token_ids
        return None if ids is None else tuple(ids)

    async def aresult(self) -> Result:
        """Waits for the end without blocking the event loop."""
        while not self._ticket.done:
            await self._await()
        return self._result()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while True:
            if (delta := self._unread()) is not None:
                return delta
            if self._ticket.done:
                self._end()
                raise StopIteration
            self._wait(self._seen)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while True:
            if (delta := self._unread()) is not None:
                return delta
            if self._ticket.done:
                self._end()
                raise StopAsyncIteration
            await self._await()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def _unread(self) -> str | None:
        text = self._ticket.text
        if len(text) == self._seen:
            return None
        delta, self._seen = text[self._seen :], len(text)
        return delta

    def _result(self) -> Result:
        self._end()
        return self._ticket.result()

    def _end(self) -> None:
        self._finalizer.detach()
        self._ticket.raise_error()

    def _left(self) -> float | None:
        deadline = self._ticket.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _wait(self, seen: int | None) -> None:
        """Waits for a change; ends the request at its deadline and on Ctrl-C."""
        self._loop.check_owner()
        try:
            if not self._ticket.wait(seen, self._left()):
                self._loop.cancel(self._ticket, timed_out())
        except BaseException:
            self.cancel()
            raise

    async def _await(self) -> None:
        self._loop.check_owner()
        if self._changed is None:
            self._changed = asyncio.Event()
            self._ticket.listen(_notifier(asyncio.get_running_loop(), self._changed))
        elif not self._ticket.done and len(self._ticket.text) == self._seen:
            try:
                async with asyncio.timeout(self._left()):
                    await self._changed.wait()
            except TimeoutError:
                self._loop.cancel(self._ticket, timed_out())
            except BaseException:
                self.cancel()
                raise
        # Cleared before the next look at the ticket, so no change is missed.
        self._changed.clear()


def _notifier(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> Callable[[], None]:
    def notify() -> None:
        # The event loop may be gone while the engine still generates.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(changed.set)

    return notify
