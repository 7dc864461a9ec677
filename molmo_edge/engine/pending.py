"""One request in flight, shared by the engine thread, which writes, and its consumer, which reads.

It ends exactly once, by whoever comes first.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from molmo_edge.errors import MolmoEdgeError, RequestError
from molmo_edge.interface import Rendered, Update
from molmo_edge.results import Metrics, Result
from molmo_edge.sampling import Sampling


class Waiters:
    """Threads and asyncio tasks that wait until some shared state changes.

    Built on `queue.SimpleQueue`: Condition, Event and Future can stay locked for good when Ctrl-C
    arrives inside one of their methods. `wake` takes no lock, so a finalizer may call it anywhere.
    """

    def __init__(self) -> None:
        self._wakes: list[Callable[[], None]] = []

    def wake(self) -> None:
        """Make every waiter look at the state again; call after changing it."""
        if self._wakes:
            for wake in tuple(self._wakes):
                wake()

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Block until `ready()`; False when `timeout` seconds pass first."""
        changed: queue.SimpleQueue[None] = queue.SimpleQueue()
        end = None if timeout is None else time.monotonic() + timeout

        def wake() -> None:
            changed.put(None)

        try:
            self._wakes.append(wake)  # before looking: no change is missed
            while not ready():
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                with suppress(queue.Empty):
                    changed.get(timeout=None if left is None else min(left, threading.TIMEOUT_MAX))
            return True
        finally:
            self._remove(wake)

    async def async_wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """`wait` without blocking the event loop."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the event loop was closed while the engine generates
                loop.call_soon_threadsafe(changed.set)

        try:
            self._wakes.append(wake)
            async with asyncio.timeout(timeout):
                while not ready():
                    await changed.wait()
                    changed.clear()
            return True
        except TimeoutError:
            return ready()
        finally:
            self._remove(wake)

    def _remove(self, wake: Callable[[], None]) -> None:
        with suppress(ValueError):  # Ctrl-C came before it was added
            self._wakes.remove(wake)


class PendingRequest:
    """State of one request.

    Unread text is one growing string, so a consumer that never reads costs no more memory than
    the answer itself, which `max_tokens` bounds.

    Attributes:
        text: what was generated so far.
        done: whether the request has ended, successfully or not.
        deadline: on the monotonic clock, None for none.
        rendered: the engine's input, None once the engine has it.
        prompt_token_ids: the prompt's tokens, image tokens included; None when not known.
    """

    def __init__(
        self,
        request_id: str,
        rendered: Rendered,
        sampling: Sampling,
        *,
        started: float,
        preprocess_s: float | None = None,
        deadline: float | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self.request_id = request_id
        self.rendered: Rendered | None = rendered
        self.prompt_token_ids = rendered.token_ids
        self.sampling = sampling
        self.deadline = deadline
        self.text = ""
        self.done = False
        self._started = started
        self._submitted = time.monotonic()
        self._accepted: float | None = None
        self._preprocess_s = preprocess_s
        self._counts = (rendered.prompt_tokens, rendered.image_tokens)
        self._answer_prefix = rendered.answer_prefix
        self._start = ""  # of the answer, while it may be the beginning of its prefix
        self._environment = environment
        self._token_ids: list[int] = []
        self._token_times: list[float] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[Mapping[int, float]] = []
        self._cached_tokens: int | None = None
        self._finish_reason: str | None = None
        self._error: MolmoEdgeError | None = None
        # Reentrant: a finalizer may run anywhere, and cancel what this thread is busy with.
        self._lock = threading.RLock()
        self._text_waiters = Waiters()
        self._end_waiters = Waiters()

    # The engine thread's side.

    def accept(self) -> None:
        """The engine has the request; its input is no longer needed here."""
        self._accepted = time.monotonic()
        self.rendered = None

    def feed(self, update: Update, now: float) -> None:
        """Add what a step produced at `now`; nothing when the request has ended before."""
        with self._lock:
            if self.done:
                return
            text = self._without_prefix(update)
            self.text += text
            self._token_ids += update.token_ids
            self._token_times += [now] * len(update.token_ids)
            if update.logprobs is not None:
                self._logprobs.extend(update.logprobs)
            if update.top_logprobs is not None:
                self._top_logprobs.extend(update.top_logprobs)
            if update.cached_tokens is not None:
                self._cached_tokens = update.cached_tokens
            if update.finish_reason is not None:
                self._finish_reason = update.finish_reason
                self._end()
            elif text:
                self._text_waiters.wake()

    def _without_prefix(self, update: Update) -> str:
        prefix, text = self._answer_prefix, self._start + update.text
        if len(text) < len(prefix) and prefix.startswith(text) and update.finish_reason is None:
            self._start = text
            return ""
        self._start = self._answer_prefix = ""
        return text.removeprefix(prefix)

    def fail(self, error: MolmoEdgeError) -> bool:
        """End the request with `error`, from any thread; False when it had ended already."""
        with self._lock:
            if self.done:
                return False
            if isinstance(error, RequestError) and not error.partial:
                error.partial = self.text
            self._error = error
            self.rendered = None
            self._end()
            return True

    def _end(self) -> None:
        # Last: readers look at `done` without the lock, and then find everything in place.
        self.done = True
        self._text_waiters.wake()
        self._end_waiters.wake()

    # The consumer's side.

    def wait(self, seen: int | None, timeout: float | None) -> bool:
        """Wait for text beyond `seen` characters, or with None for the end.

        Returns False when `timeout` seconds pass first.
        """
        if seen is None:
            return self._end_waiters.wait(lambda: self.done, timeout)
        return self._text_waiters.wait(lambda: self.done or len(self.text) > seen, timeout)

    async def async_wait(self, seen: int | None, timeout: float | None) -> bool:
        """`wait` without blocking the event loop."""
        if seen is None:
            return await self._end_waiters.async_wait(lambda: self.done, timeout)
        return await self._text_waiters.async_wait(
            lambda: self.done or len(self.text) > seen, timeout
        )

    def raise_error(self) -> None:
        """Raise the error that ended the request, if one did.

        A copy each time: a traceback keeps the caller's frames alive, and they this object.
        """
        if self._error is not None:
            raise _copy(self._error)

    def result(self) -> Result:
        """Return the finished answer. Raises the request's error if it ended with one."""
        self.raise_error()
        assert self._finish_reason is not None
        requested = self.sampling.logprobs or 2 * len(self.sampling.logprob_token_ids)
        return Result(
            text=self.text,
            finish_reason=self._finish_reason,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs) if requested else None,
            top_logprobs=tuple(self._top_logprobs) if requested > 1 else None,
            metrics=self._metrics(),
            environment=self._environment,
        )

    def _metrics(self) -> Metrics:
        times = self._token_times
        count = len(times)
        decode_s = times[-1] - times[0] if count > 1 else None
        e2e_s = times[-1] - self._started if times else None
        return Metrics(
            queue_s=None if self._accepted is None else self._accepted - self._submitted,
            preprocess_s=self._preprocess_s,
            ttft_s=times[0] - self._started if times else None,
            itl_s=tuple(b - a for a, b in itertools.pairwise(times)),
            tpot_s=decode_s / (count - 1) if decode_s is not None else None,
            e2e_s=e2e_s,
            prompt_tokens=self._counts[0],
            image_tokens=self._counts[1],
            output_tokens=count,
            cached_tokens=self._cached_tokens,
            output_tps=(count - 1) / decode_s if decode_s else None,
            request_tps=count / e2e_s if e2e_s else None,
        )


def _copy(error: MolmoEdgeError) -> MolmoEdgeError:
    try:
        twin = copy.copy(error)
    except TypeError:  # a class of a custom engine, with arguments of its own
        return error
    twin.__cause__, twin.__suppress_context__ = error.__cause__, error.__suppress_context__
    return twin
