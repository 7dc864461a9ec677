"""An engine without a model: scripted answers, delays and failures.

For tests of code built on molmo_edge; needs neither vLLM nor torch nor a checkpoint::

    from molmo_edge import EdgeVLM
    from molmo_edge.engine.fake import FakeEngine

    def test_it_asks_for_the_mug():
        fake = FakeEngine.factory({"Where is the mug?": "On the table."})
        with EdgeVLM(engine=fake) as vlm:
            assert my_robot(vlm).look() == "On the table."
        assert fake.engine.prompts == ["Where is the mug?"]

Deterministic: the same questions in the same order give the same steps. Prompts are checked as the
real engine checks them.
"""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from molmo_edge.errors import ImageError, PromptError
from molmo_edge.interface import EngineInfo, Rendered, Turn, Update
from molmo_edge.requests import check_length, check_turns, refuse_special
from molmo_edge.sampling import Sampling

__all__ = ["FakeEngine", "FakeFactory", "Fault"]

Answers: TypeAlias = "str | Mapping[str, str] | Callable[[Sequence[Turn]], str]"

END_OF_TEXT = 0  # token id; all other tokens have a higher one
_IMAGE_TOKENS = 144
_SPECIAL = dict(
    enumerate(["<|endoftext|>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"])
)


@dataclass(frozen=True)
class Fault:
    """An exception for a call to raise.

    Attributes:
        call: the name of a method of `FakeEngine`, or ``"build"``.
        error: the exception.
        number: which of these calls fails, counted from 1 over all engines of a factory; None for
            all of them.
    """

    call: str
    error: BaseException
    number: int | None = None


class FakeEngine:
    """A fake engine; usually built by `FakeEngine.factory`.

    Args:
        answers: one answer for every question; or question → answer, with ``""`` for any other
            question; or a function of the turns. A mapping without ``""`` raises PromptError for
            any other question.
        pieces: a token is a word with the space before it (``"words"``) or a character.
        max_num_seqs: number of requests decoded together; the others wait.
        max_model_len: tokens of prompt and answer together.
        step_s: seconds that each step takes.
        factory: its faults, holds and counts apply to this engine.

    Attributes:
        prompts: last user text of every added request, in order.
        added, finished, aborted: request ids in order; `aborted` as given to `abort`.
        closed: whether `close` was called.
    """

    def __init__(
        self,
        answers: Answers = "This is a fake answer.",
        *,
        pieces: Literal["words", "chars"] = "words",
        max_num_seqs: int = 8,
        max_model_len: int = 4096,
        step_s: float = 0.0,
        factory: FakeFactory | None = None,
    ) -> None:
        self._answers = answers
        self._split = re.compile(r"\s*\S+|\s+$" if pieces == "words" else r"(?s).")
        self._max_num_seqs = max_num_seqs
        self._step_s = step_s
        self._factory = factory or FakeFactory()
        self._thread = threading.get_ident()
        self._requests: dict[str, _Request] = {}
        self.prompts: list[str] = []
        self.added: list[str] = []
        self.finished: list[str] = []
        self.aborted: list[str] = []
        self.closed = False
        self._call("build")
        environment = {"model": "fake", "max_model_len": max_model_len}
        self.info = EngineInfo(max_model_len, environment, startup_s={"total": 0.0})

    @staticmethod
    def factory(answers: Answers = "This is a fake answer.", **options: Any) -> FakeFactory:
        """Return a `FakeFactory` with these arguments, for `EdgeVLM(engine=…)`."""
        return FakeFactory(answers, **options)

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        """Raises PromptError, PromptTooLongError and ImageError as the real engine does."""
        self._factory.enter("render")
        check_turns(turns)
        text = "".join(f" {turn.role.capitalize()}: {turn.text}" for turn in turns)
        refuse_special([i for i, name in _SPECIAL.items() if name in text], _SPECIAL)
        images = sum(len(turn.images) for turn in turns)
        if images > 1 or (images and not turns[0].images):
            raise ImageError("A request may contain one image, in its first turn.")
        pieces = self._split.findall(f"{text} Assistant:")
        ids = [END_OF_TEXT, *map(_id, pieces), *options.get("answer", ())]
        image_tokens = _IMAGE_TOKENS * images
        total = len(ids) + image_tokens
        check_length(total, self.info.max_model_len, images)
        prompt = turns[-1].text, self._answer(turns), total
        return Rendered(prompt, total, image_tokens, None if images else ids, answer_prefix=" ")

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        """Start to answer a request."""
        self._call("add")
        question, answer, prompt_tokens = rendered.prompt
        self.prompts.append(question)
        self.added.append(request_id)
        pieces = self._split.findall(" " + answer)
        room = self.info.max_model_len - prompt_tokens
        self._requests[request_id] = _Request(pieces, sampling, min(sampling.max_tokens, room))

    def step(self) -> list[Update]:
        """Generate one token for each of the first `max_num_seqs` requests."""
        if self._step_s:
            time.sleep(self._step_s)
        self._call("step")
        running = list(self._requests)[: self._max_num_seqs]
        updates = [self._requests[i].step(i) for i in running]
        for update in updates:
            if update.finish_reason is not None:
                del self._requests[update.request_id]
                self.finished.append(update.request_id)
        return updates

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown ids are ignored."""
        self._call("abort")
        self.aborted.extend(request_ids)
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def check_schema(self, schema: Mapping[str, Any]) -> None:
        """Accept any schema; answers are scripted."""

    def reset_caches(self) -> None:
        """Count the call; there are no caches."""
        self._call("reset_caches")

    def close(self) -> None:
        """Drop all requests."""
        self._requests.clear()
        self.closed = True
        self._call("close")

    @property
    def running(self) -> list[str]:
        """Ids of requests that have neither finished nor been aborted."""
        return list(self._requests)

    def _call(self, name: str) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(f"{name}() was called outside the thread that built the engine.")
        self._factory.enter(name)

    def _answer(self, turns: Sequence[Turn]) -> str:
        if isinstance(self._answers, str):
            return self._answers
        if callable(self._answers):
            return self._answers(turns)
        answer = self._answers.get(turns[-1].text, self._answers.get(""))
        if answer is None:
            raise PromptError('The fake engine has no answer to this question; add it, or "".')
        return answer


class FakeFactory:
    """Builds fake engines and keeps them.

    Args:
        answers, options: those of `FakeEngine`.
        faults: calls that fail.
        holds: call name → event that the call waits for, so that a test can look at an engine that
            is stuck in a step, or still starting.

    Attributes:
        engines: every engine built, oldest first: one for each start and restart.
        calls: how often each call has begun, over all engines.
        holds: as given.
    """

    def __init__(
        self,
        answers: Answers = "This is a fake answer.",
        *,
        faults: Sequence[Fault] = (),
        holds: Mapping[str, threading.Event] | None = None,
        **options: Any,
    ) -> None:
        self.engines: list[FakeEngine] = []
        self.calls: Counter[str] = Counter()
        self.holds = dict(holds or {})
        self._faults = tuple(faults)
        self._answers = answers
        self._options = options
        self._changed = threading.Condition()

    def __call__(self) -> FakeEngine:
        engine = FakeEngine(self._answers, factory=self, **self._options)
        self.engines.append(engine)
        return engine

    @property
    def engine(self) -> FakeEngine:
        """The engine built last."""
        return self.engines[-1]

    def wait_for(self, call: str, count: int = 1, timeout: float = 10.0) -> None:
        """Wait until a call has begun `count` times in all. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.calls[call] >= count, timeout):
                raise TimeoutError(
                    f"{call}() began {self.calls[call]} times in {timeout:g} s, not {count}."
                )

    def enter(self, call: str) -> None:
        """Count a call, wait while it is held, and raise its fault; in any thread."""
        with self._changed:
            self.calls[call] += 1
            number = self.calls[call]
            self._changed.notify_all()
        if call in self.holds:
            self.holds[call].wait()
        for fault in self._faults:
            if fault.call == call and fault.number in (None, number):
                raise fault.error


@dataclass
class _Request:
    """A request that is being answered."""

    pieces: Sequence[str]
    sampling: Sampling
    max_tokens: int
    tokens: int = 0
    text: str = ""
    shown: int = 0

    def step(self, request_id: str) -> Update:
        stops = self.sampling.stop
        cycle = self.sampling.ignore_eos and bool(self.pieces)
        ended = not cycle and self.tokens >= len(self.pieces)
        piece = "" if ended else self.pieces[self.tokens % len(self.pieces)]
        token = END_OF_TEXT if ended else _id(piece)
        self.tokens += 1
        self.text += piece
        reason = "stop" if ended else "length" if self.tokens >= self.max_tokens else None
        end = len(self.text)
        if places := [self.text.index(stop) for stop in stops if stop in self.text]:
            reason, end = "stop", min(places)
        elif reason is None and stops:
            # Hold back text that may be the beginning of a stop string.
            end = max(self.shown, end - max(map(len, stops)) + 1)
        text, self.shown = self.text[self.shown : end], end
        wanted = [*self.sampling.logprob_token_ids, *range(1, self.sampling.logprobs or 0)]
        if not wanted and not self.sampling.logprobs:
            return Update(request_id, text, (token,), None, None, reason, 0)
        top = {one: -(1 + one % 7) / 8 for one in [token, *wanted]}
        return Update(request_id, text, (token,), [top[token]], [top], reason, 0)


def _id(piece: str) -> int:
    return 1 + zlib.crc32(piece.encode()) % 0xFFFF
