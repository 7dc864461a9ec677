"""One request in flight, as the engine thread and its consumer share it.

The engine thread writes, any other thread reads. A ticket ends exactly once, by whoever comes
first. It knows nothing of engines and queues.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Mapping
from typing import Any

from molmo_edge.engine.gate import Gate
from molmo_edge.errors import MolmoEdgeError, RequestError
from molmo_edge.interface import Rendered, Update
from molmo_edge.results import Metrics, Result
from molmo_edge.sampling import Sampling


class Ticket:
    """State of one request.

    Unread text is one growing string, so a consumer that never reads costs no more memory than
    the answer itself, which `max_tokens` bounds.

    Attributes:
        done: whether the request has ended, well or not.
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
        self.sampling = sampling
        self.started = started
        self.deadline = deadline
        self.submitted = time.monotonic()
        self._preprocess_s = preprocess_s
        self._counts = (rendered.prompt_tokens, rendered.image_tokens)
        self._environment = environment
        self._answer_prefix = rendered.answer_prefix
        self._taken: float | None = None
        self._text = ""
        self._token_ids: list[int] = []
        self._token_times: list[float] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[Mapping[int, float]] = []
        self._cached_tokens: int | None = None
        self.prompt_token_ids = rendered.token_ids
        self._finish_reason: str | None = None
        self._error: MolmoEdgeError | None = None
        self.done = False
        self._gate = Gate()

    # The engine thread's side.

    def taken(self) -> None:
        """The engine has the request now; its input is no longer needed here."""
        self._taken = time.monotonic()
        self.rendered = None

    def feed(self, update: Update, now: float) -> bool:
        """Adds what a step brought at `now`; False when the request had ended before."""
        with self._gate.lock:
            if self.done:
                return False
            text = update.text
            if not self._text:
                text = text.removeprefix(self._answer_prefix)
            self._text += text
            self._token_ids += update.token_ids
            self._token_times += [now] * len(update.token_ids)
            if update.logprobs is not None:
                self._logprobs.extend(update.logprobs)
            if update.top_logprobs is not None:
                self._top_logprobs.extend(update.top_logprobs)
            if update.cached_tokens is not None:
                self._cached_tokens = update.cached_tokens
            ended = update.finish_reason is not None
            if ended:
                self._finish_reason = update.finish_reason
                # Last: readers look at `done` without the lock, and then find everything there.
                self.done = True
            if ended or text:
                self._gate.wake(big=ended)
            return True

    def fail(self, error: MolmoEdgeError) -> bool:
        """Ends the request with `error`; False when it had ended already."""
        with self._gate.lock:
            if self.done:
                return False
            if isinstance(error, RequestError) and not error.partial:
                error.partial = self._text
            self._error = error
            self.rendered = None
            self.done = True
            self._gate.wake()
            return True

    # The consumer's side.

    @property
    def text(self) -> str:
        """What was generated so far."""
        return self._text

    def wait(self, seen: int | None, timeout: float | None) -> bool:
        """Waits for text beyond `seen` characters, or with None for the end.

        Returns False when `timeout` seconds pass first.
        """
        return self._gate.wait_for(lambda: self._has(seen), timeout, small=seen is not None)

    async def async_wait(self, seen: int | None, timeout: float | None) -> bool:
        """`wait` without blocking the event loop."""
        return await self._gate.async_wait_for(
            lambda: self._has(seen), timeout, small=seen is not None
        )

    def _has(self, seen: int | None) -> bool:
        return self.done or (seen is not None and len(self._text) > seen)

    def raise_error(self) -> None:
        """Raises the error that ended the request, if one did.

        A copy each time: its traceback holds the caller's frames, and this ticket lives in them.
        """
        if self._error is not None:
            raise _copied(self._error)

    def result(self) -> Result:
        """The finished answer. Raises the request's error if it ended with one."""
        self.raise_error()
        assert self._finish_reason is not None
        asked = self.sampling.logprobs or 2 * len(self.sampling.logprob_token_ids)
        return Result(
            text=self._text,
            finish_reason=self._finish_reason,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs) if asked else None,
            top_logprobs=tuple(self._top_logprobs) if asked > 1 else None,
            metrics=self._metrics(),
            environment=self._environment,
        )

    def _metrics(self) -> Metrics:
        times = self._token_times
        count = len(times)
        decode_s = times[-1] - times[0] if count > 1 else None
        e2e_s = times[-1] - self.started if times else None
        return Metrics(
            queue_s=None if self._taken is None else self._taken - self.submitted,
            preprocess_s=self._preprocess_s,
            ttft_s=times[0] - self.started if times else None,
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


def _copied(error: MolmoEdgeError) -> MolmoEdgeError:
    try:
        twin = copy.copy(error)
    except TypeError:  # a class of somebody else's engine, with arguments of its own
        return error
    twin.__cause__, twin.__suppress_context__ = error.__cause__, error.__suppress_context__
    return twin
