"""One request in flight, shared by the engine thread, which writes, and its consumer, which reads.

It ends exactly once, by whoever comes first.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from molmo_edge.errors import GenerationError, MolmoEdgeError, RequestError, RequestTimeout
from molmo_edge.interface import Rendered, Update
from molmo_edge.requests import CheckedOptions
from molmo_edge.results import Metrics, Result

_NAN = (
    "The model computed NaN. A number format overflows, or a kernel is broken on this device: try "
    "dtype bfloat16 or float32, precision bf16, kv_cache_dtype auto or another attention_backend. "
    "`molmo-edge verify` tries a combination without the weights; if all fail, download them again."
)

# A Ctrl-C that comes just before a thread blocks is noticed only when the thread wakes.
_INTERRUPT_S = 0.5


def timed_out() -> RequestTimeout:
    """The error of a request whose deadline passed."""
    return RequestTimeout("The request's deadline passed; `.partial` has the text until then.")


class Waiters:
    """Threads and asyncio tasks that wait until some shared state changes.

    Built on `queue.SimpleQueue`: Condition, Event and Future can stay locked for good when Ctrl-C
    arrives inside one of their methods. `wake` takes no lock, so a finalizer may call it anywhere.
    """

    def __init__(self) -> None:
        # What each waits for, and how to wake it.
        self._waiters: list[tuple[Callable[[], bool], Callable[[], None]]] = []

    def wake(self) -> None:
        """Wake every waiter whose state has come; call after changing it."""
        if self._waiters:
            for ready, wake in tuple(self._waiters):
                if ready():
                    wake()

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Block until `ready()`; False when `timeout` seconds pass first."""
        woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        waiter = ready, lambda: woken.put(None)
        end = math.inf if timeout is None else time.monotonic() + timeout
        try:
            self._waiters.append(waiter)  # before looking: no change is missed
            while not ready():
                left = end - time.monotonic()
                if left <= 0:
                    return False
                with suppress(queue.Empty):
                    woken.get(timeout=min(left, _INTERRUPT_S))
            return True
        finally:
            self._remove(waiter)

    async def async_wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """`wait` without blocking the event loop."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the event loop was closed while the engine generates
                loop.call_soon_threadsafe(woken.set)

        waiter = ready, wake
        try:
            self._waiters.append(waiter)
            async with asyncio.timeout(timeout):
                if not ready():
                    await woken.wait()
            return True
        except TimeoutError:
            return ready()
        finally:
            self._remove(waiter)

    def _remove(self, waiter: tuple[Callable[[], bool], Callable[[], None]]) -> None:
        with suppress(ValueError):  # Ctrl-C came before it was added
            self._waiters.remove(waiter)


class PendingRequest:
    """State of one request; `changed` wakes whoever waits for more of it."""

    def __init__(
        self,
        request_id: str,
        rendered: Rendered,
        options: CheckedOptions,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self.request_id = request_id
        # None once the engine has it or the request has ended.
        self.rendered: Rendered | None = rendered
        self.prompt_token_ids = rendered.token_ids
        self.options = options
        self.text = ""  # generated so far
        self.stop: str | None = None  # the stop string that ended the answer
        self.done = False  # ended, successfully or not
        self.changed = Waiters()
        self._submitted = time.monotonic()
        self._queue_s: float | None = None
        self._prompt_tokens = rendered.prompt_tokens
        self._image_tokens = rendered.image_tokens
        self._answer_prefix = rendered.answer_prefix
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

    def left_s(self) -> float | None:
        """Return the seconds until the deadline, None for none."""
        deadline = self.options.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    # The engine thread's side.

    def accept(self) -> None:
        """The engine has the request; its input is no longer needed here."""
        self._queue_s = time.monotonic() - self._submitted
        self.rendered = None

    def feed(self, update: Update, now: float) -> None:
        """Add what a step produced at `now`; nothing when the request has ended before."""
        with self._lock:
            if self.done:
                return
            if any(map(math.isnan, update.logprobs or ())):
                self.fail(GenerationError(_NAN))
                return
            text = update.text
            if text and self._answer_prefix:
                text, self._answer_prefix = text.removeprefix(self._answer_prefix), ""
            self.text += text
            self._token_ids += update.token_ids
            self._token_times += [now] * len(update.token_ids)
            self._logprobs += update.logprobs or ()
            self._top_logprobs += update.top_logprobs or ()
            if update.cached_tokens is not None:
                self._cached_tokens = update.cached_tokens
            if update.finish_reason in ("stop", "length"):
                self._finish_reason, self.stop = update.finish_reason, update.stop
                self.done = True
            elif update.finish_reason is not None:
                self.fail(GenerationError("The engine aborted the request."))
            self.changed.wake()

    def fail(self, error: MolmoEdgeError) -> bool:
        """End the request with `error`, from any thread; False when it had ended already."""
        with self._lock:
            if self.done:
                return False
            if isinstance(error, RequestError) and not error.partial:
                error.partial = self.text
            self._error = error
            self.rendered = None
            # Last: readers look at `done` without the lock, and then find everything in place.
            self.done = True
            self.changed.wake()
            return True

    def expire(self, now: float) -> None:
        """End the request if its deadline has passed."""
        if (deadline := self.options.deadline) is not None and now >= deadline:
            self.fail(timed_out())

    # The consumer's side.

    def has_more(self, seen: int | None) -> bool:
        """Whether there is text beyond `seen` characters, None for the end."""
        return self.done or (seen is not None and len(self.text) > seen)

    def raise_error(self) -> None:
        """Raise the error that ended the request, if one did."""
        if self._error is not None:
            # A copy: a traceback keeps the caller's frames alive, and they this object.
            raise copy.copy(self._error) from self._error.__cause__

    def result(self) -> Result:
        """Return the finished answer. Raises the request's error if it ended with one."""
        self.raise_error()
        assert self._finish_reason is not None
        requested = self.options.logprobs or 2 * len(self.options.logprob_token_ids)
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
        times, started = self._token_times, self.options.started
        count = len(times)
        decode_s = times[-1] - times[0] if count > 1 else None
        e2e_s = times[-1] - started if times else None
        return Metrics(
            queue_s=self._queue_s,
            preprocess_s=self._submitted - started,
            ttft_s=times[0] - started if times else None,
            itl_s=tuple(b - a for a, b in itertools.pairwise(times)),
            tpot_s=decode_s / (count - 1) if decode_s is not None else None,
            e2e_s=e2e_s,
            prompt_tokens=self._prompt_tokens,
            image_tokens=self._image_tokens,
            output_tokens=count,
            cached_tokens=self._cached_tokens,
            output_tps=(count - 1) / decode_s if decode_s else None,
            request_tps=count / e2e_s if e2e_s else None,
        )
