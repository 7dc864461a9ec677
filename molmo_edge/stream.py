"""`Stream`: an answer while it is generated, as an iterator and as an async iterator."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Collection, Generator
from functools import partial
from typing import Any, Self

from molmo_edge.engine.loop import EngineLoop
from molmo_edge.engine.pending import PendingRequest, timed_out
from molmo_edge.results import Result

# A reader that wakes takes the interpreter from the engine's thread, for some 0.2 ms in all. So it
# wakes at the first delta, at the end, and between them at most this often.
_PAUSE_S = 0.02


class Stream:
    """Iterates over text deltas: `str` pieces of whole characters that join to `Result.text`.

    Tokens that come faster than fifty a second are read several at once. Works as an iterator and
    as an async iterator. Leaving the loop early, dropping the stream, `cancel()`, a passed deadline
    and a cancelled task each free the sequence in the engine.

    Raises while iterating, after the text generated before it:
        RequestTimeout, RequestCancelled, GenerationError, EngineDeadError, EngineClosedError.
    """

    def __init__(self, loop: EngineLoop, request: PendingRequest) -> None:
        self._loop = loop
        self._request = request
        self._seen = 0
        self._next_read = 0.0  # time.monotonic() of the earliest
        self._finalizer = weakref.finalize(self, loop.abandon, request)
        # At exit the whole engine goes; one command for each stream would only slow it.
        self._finalizer.atexit = False

    @property
    def text(self) -> str:
        """The text generated so far."""
        return self._request.text

    @property
    def done(self) -> bool:
        """Whether the answer is complete or has failed."""
        return self._request.done

    def cancel(self) -> None:
        """Stop generating; the text so far stays in `text`. Does nothing after the end."""
        self._loop.cancel(self._request)

    def result(self) -> Result:
        """Wait for the end. Raises what iterating would raise."""
        while not self._request.done:
            self._wait(None)
        return self._result()

    @property
    def prompt_token_ids(self) -> tuple[int, ...] | None:
        """Tokens of the prompt, image tokens included; None when unknown."""
        ids = self._request.prompt_token_ids
        return None if ids is None else tuple(ids)

    async def aresult(self) -> Result:
        """Wait for the end without blocking the event loop."""
        while not self._request.done:
            await self._await(None)
        return self._result()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while (delta := self._read()) is None:
            self._wait(self._seen)
        if not delta:
            raise StopIteration
        return delta

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while (delta := self._read()) is None:
            await self._await(self._seen)
        if not delta:
            raise StopAsyncIteration
        return delta

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def _read(self) -> str | None:
        """Return text not read yet, "" at the end, None before either."""
        # Looked at first: text that arrives between the two looks must not be taken for the end.
        done, text = self._request.done, self._request.text
        delta, self._seen = text[self._seen :], len(text)
        if delta:
            self._next_read = time.monotonic() + _PAUSE_S
        elif done:
            self._end()
        return delta if delta or done else None

    def _result(self) -> Result:
        self._end()
        return self._request.options.read(self._request.result(), self._request.stop)

    def _end(self) -> None:
        self._finalizer.detach()
        self._request.raise_error()

    def _wait(self, seen: int | None) -> None:
        """Wait for a change; end the request at its deadline, and when nobody waits any longer."""
        try:
            self._loop.check_may_wait()
            more = partial(self._request.has_more, seen)
            if (pause := self._next_read - time.monotonic()) > 0:
                self._request.changed.wait(lambda: self._request.done, pause)
            if not self._request.changed.wait(more, self._request.left_s()):
                self._loop.cancel(self._request, timed_out())
        except BaseException:  # Ctrl-C
            self.cancel()
            raise

    async def _await(self, seen: int | None) -> None:
        try:
            self._loop.check_may_wait()
            more = partial(self._request.has_more, seen)
            if (pause := self._next_read - time.monotonic()) > 0:
                await self._request.changed.async_wait(lambda: self._request.done, pause)
            if not await self._request.changed.async_wait(more, self._request.left_s()):
                self._loop.cancel(self._request, timed_out())
        except BaseException:  # the task was cancelled
            self.cancel()
            raise


def wait_any(streams: Collection[Stream]) -> None:
    """Wait until one of several streams has ended; one whose deadline passes ends."""
    loop = next(iter(streams))._loop
    loop.check_may_wait()
    left = [left for one in streams if (left := one._request.left_s()) is not None]
    loop.changed.wait(lambda: any(one.done for one in streams), min(left, default=None))
    for one in streams:
        if one._request.left_s() == 0:
            loop.cancel(one._request, timed_out())


class AStream:
    """Result of `EdgeVLM.astream`: await it for the `Stream`, or iterate over its deltas.

    The request is submitted at the first of the two.
    """

    def __init__(self, open_stream: Callable[[], Awaitable[Stream]]) -> None:
        self._open_stream = open_stream
        self._opening = asyncio.Lock()  # several tasks may share the stream
        self._stream: Stream | None = None

    def __await__(self) -> Generator[Any, Any, Stream]:
        return self._opened().__await__()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        return await anext(await self._opened())

    async def _opened(self) -> Stream:
        async with self._opening:
            if self._stream is None:
                self._stream = await self._open_stream()
        return self._stream
