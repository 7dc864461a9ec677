"""`Stream`: an answer while it is generated, as an iterator and as an async iterator."""

from __future__ import annotations

import time
import weakref
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Self

from molmo_edge.engine.loop import EngineLoop
from molmo_edge.engine.pending import PendingRequest, timed_out
from molmo_edge.requests import CheckedOptions
from molmo_edge.results import Result


class Stream:
    """Iterates over text deltas: `str` pieces of whole characters that join to `Result.text`.

    Works as an iterator and as an async iterator. Leaving the loop early, dropping the stream,
    `cancel()`, a passed deadline and a cancelled task each free the sequence in the engine.

    Raises while iterating, after the text generated before it:
        RequestTimeout, RequestCancelled, GenerationError, EngineDeadError, EngineClosedError.
    """

    def __init__(self, loop: EngineLoop, request: PendingRequest, options: CheckedOptions) -> None:
        self._loop = loop
        self._request = request
        self._options = options
        self._seen = 0
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
        try:
            while not self._request.done:
                self._wait(None)
        except BaseException:  # Ctrl-C included: nobody waits any longer
            self.cancel()
            raise
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
        while True:
            # Read first: text that arrives between the two reads must not be taken for the end.
            done = self._request.done
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
            done = self._request.done
            if (delta := self._unread()) is not None:
                return delta
            if done:
                self._end()
                raise StopAsyncIteration
            await self._await(self._seen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def _unread(self) -> str | None:
        text = self._request.text
        if len(text) == self._seen:
            return None
        delta, self._seen = text[self._seen :], len(text)
        return delta

    def _result(self) -> Result:
        self._end()
        return self._options.read(self._request.result())

    def _end(self) -> None:
        self._finalizer.detach()
        self._request.raise_error()

    def _left(self) -> float | None:
        deadline = self._request.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _wait(self, seen: int | None) -> None:
        """Wait for a change; end the request at its deadline."""
        self._loop.check_may_wait()
        if not self._request.wait(seen, self._left()):
            self._loop.cancel(self._request, timed_out())

    async def _await(self, seen: int | None) -> None:
        self._loop.check_may_wait()
        try:
            if not await self._request.async_wait(seen, self._left()):
                self._loop.cancel(self._request, timed_out())
        except BaseException:  # the task was cancelled
            self.cancel()
            raise


class AStream:
    """Result of `EdgeVLM.astream`: await it for the `Stream`, or iterate over its deltas.

    The request is submitted at the first of the two.
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
