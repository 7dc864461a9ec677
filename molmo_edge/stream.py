"""`Stream`: an answer while it is being generated, for threads and for asyncio."""

from __future__ import annotations

import time
import weakref
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Self

from molmo_edge.engine.loop import EngineLoop
from molmo_edge.engine.pending import Ticket
from molmo_edge.engine.runner import timed_out
from molmo_edge.results import Result


class Stream:
    """Iterates over text deltas, never half a character; `str` pieces that join to `Result.text`.

    Works as an iterator and as an async iterator. Leaving the loop early, dropping the stream,
    `cancel()`, a passed deadline and a cancelled task each free the sequence in the engine.

    Raises while iterating, behind the text that came first:
        RequestTimeout, RequestCancelled, GenerationError, EngineDeadError, EngineClosedError.
    """

    def __init__(
        self,
        loop: EngineLoop,
        ticket: Ticket,
        read: Callable[[Result], Result] | None = None,
    ) -> None:
        self._loop = loop
        self._ticket = ticket
        self._read = read
        self._seen = 0
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
        try:
            while not self._ticket.done:
                self._wait(None)
        except BaseException:  # Ctrl-C among them: nobody waits any more
            self.cancel()
            raise
        return self._result()

    @property
    def prompt_token_ids(self) -> tuple[int, ...] | None:
        """The prompt as the model got it, image tokens included; None when not known."""
        ids = self._ticket.prompt_token_ids
        return None if ids is None else tuple(ids)

    async def aresult(self) -> Result:
        """Waits for the end without blocking the event loop."""
        while not self._ticket.done:
            await self._await(None)
        return self._result()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while True:
            # Asked first: what comes between the two looks must not be taken for the end.
            done = self._ticket.done
            if (delta := self._unread()) is not None:
                return delta
            if done:
                self._end()
                raise StopIteration
            try:
                self._wait(self._seen)
            except BaseException:
                self.cancel()
                raise

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while True:
            done = self._ticket.done
            if (delta := self._unread()) is not None:
                return delta
            if done:
                self._end()
                raise StopAsyncIteration
            await self._await(self._seen)

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
        result = self._ticket.result()
        return result if self._read is None else self._read(result)

    def _end(self) -> None:
        self._finalizer.detach()
        self._ticket.raise_error()

    def _left(self) -> float | None:
        deadline = self._ticket.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _wait(self, seen: int | None) -> None:
        """Waits for a change; ends the request at its deadline."""
        self._loop.check_may_wait()
        if not self._ticket.wait(seen, self._left()):
            self._loop.cancel(self._ticket, timed_out())

    async def _await(self, seen: int | None) -> None:
        self._loop.check_may_wait()
        try:
            if not await self._ticket.async_wait(seen, self._left()):
                self._loop.cancel(self._ticket, timed_out())
        except BaseException:  # the task was cancelled
            self.cancel()
            raise


class AStream:
    """What `EdgeVLM.astream` returns: await it for the `Stream`, or iterate over its deltas.

    Nothing is asked before the first of the two.
    """

    def __init__(self, open_stream: Callable[[], Awaitable[Stream]]) -> None:
        self._open_stream = open_stream
        self._stream: Stream | None = None

    def __await__(self) -> Generator[Any, Any, Stream]:
        return self._opened().__await__()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        return await anext(await self._opened())

    async def _opened(self) -> Stream:
        if self._stream is None:
            self._stream = await self._open_stream()
        return self._stream
