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
real engine checks them; images and videos are accepted as by Molmo 2.
"""

from __future__ import annotations

import math
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from molmo_edge.errors import PromptError
from molmo_edge.interface import EngineInfo, Rendered, Turn, Update
from molmo_edge.requests import check_length, check_turns, refuse_special
from molmo_edge.sampling import Sampling

__all__ = ["FakeEngine", "FakeFactory", "Fault"]

Answers: TypeAlias = "str | Mapping[str, str] | Callable[[Sequence[Turn]], str]"

_END_OF_TEXT = 0  # token id; all other tokens have a higher one
_IMAGE_TOKENS, _FRAME_TOKENS = 144, 88
_SPECIAL = dict(
    enumerate(["<|endoftext|>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"])
)


class Fault(NamedTuple):
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


@dataclass
class FakeFactory:
    """Builds fake engines, for `EdgeVLM(engine=…)`, and keeps them; also `FakeEngine.factory`.

    Args:
        answers: one answer for every question; or question → answer, with ``""`` for any other
            question; or a function of the turns. A mapping without ``""`` raises PromptError for
            any other question.
        pieces: a token is a word with the space before it (``"words"``) or a character.
        max_model_len: tokens of prompt and answer together.
        step_s: seconds that each step takes.
        faults: calls that fail.
        holds: call name → event that the call waits for, so that a test can look at an engine that
            is stuck in a step, or still starting.

    Attributes:
        engines: every engine built, oldest first: one for each start and restart.
        calls: how often each call has begun, over all engines.
    """

    answers: Answers = "This is a fake answer."
    _: KW_ONLY
    pieces: Literal["words", "chars"] = "words"
    max_model_len: int = 4096
    step_s: float = 0.0
    faults: Sequence[Fault] = ()
    holds: Mapping[str, threading.Event] = field(default_factory=dict)
    engines: list[FakeEngine] = field(default_factory=list, init=False)
    calls: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()

    def __call__(self) -> FakeEngine:
        self.engines.append(FakeEngine(self))
        return self.engine

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
        for fault in self.faults:
            if fault.call == call and fault.number in (None, number):
                raise fault.error


class FakeEngine:
    """A fake engine, built by its factory.

    Attributes:
        prompts: last user text of every added request, in order.
        added, finished, aborted: request ids in order; `aborted` as given to `abort`.
        running: request id → request, of those that have neither finished nor been aborted.
        closed: whether `close` was called.
    """

    factory = FakeFactory

    def __init__(self, factory: FakeFactory) -> None:
        self._factory = factory
        self._split = re.compile(r"\s*\S+|\s+$" if factory.pieces == "words" else r"(?s).")
        self._thread = threading.get_ident()
        self.running: dict[str, _Request] = {}
        self.prompts: list[str] = []
        self.added: list[str] = []
        self.finished: list[str] = []
        self.aborted: list[str] = []
        self.closed = False
        self._enter("build")
        environment = {"model": "fake", "max_model_len": factory.max_model_len}
        self.info = EngineInfo(factory.max_model_len, environment, startup_s={"total": 0.0})

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        """Raises PromptError and PromptTooLongError as the real engine does."""
        self._factory.enter("render")
        check_turns(turns)
        text = "".join(f" {turn.role.capitalize()}: {turn.text}" for turn in turns)
        refuse_special([i for i, name in _SPECIAL.items() if name in text], _SPECIAL)
        images = sum(len(turn.images) for turn in turns)
        pieces = self._split.findall(f"{text} Assistant:")
        ids = [_END_OF_TEXT, *map(_token, pieces)]
        frames = sum(len(turn.video.frames) for turn in turns if turn.video is not None)
        image_tokens = _IMAGE_TOKENS * images + _FRAME_TOKENS * frames
        total = len(ids) + image_tokens
        check_length(total, self.info.max_model_len, images)
        prompt = turns[-1].text, self._answer(turns), total
        known = None if image_tokens else ids
        return Rendered(prompt, total, image_tokens, known, answer_prefix=" ")

    def encode(self, answer: str) -> list[int]:
        refuse_special([i for i, name in _SPECIAL.items() if name in answer], _SPECIAL)
        return [_token(piece) for piece in self._split.findall(f" {answer}")]

    def check_schema(self, schema: Mapping[str, Any]) -> None:
        """Accept any schema; answers are scripted."""

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        self._enter("add")
        question, answer, prompt_tokens = rendered.prompt
        self.prompts.append(question)
        self.added.append(request_id)
        pieces = self._split.findall(" " + answer)
        given = len(rendered.answer)
        # After the beginning of the scripted answer comes its next token, after others the end.
        begins = [_token(piece) for piece in pieces[:given]] == list(rendered.answer)
        pieces = pieces[given:] if begins else []
        room = self.info.max_model_len - prompt_tokens - len(rendered.answer)
        self.running[request_id] = _Request(pieces, sampling, min(sampling.max_tokens, room))

    def step(self) -> list[Update]:
        """Generate one token for each request."""
        time.sleep(self._factory.step_s)
        self._enter("step")
        updates = [request.step(request_id) for request_id, request in self.running.items()]
        for update in updates:
            if update.finish_reason is not None:
                del self.running[update.request_id]
                self.finished.append(update.request_id)
        return updates

    def abort(self, request_ids: Sequence[str]) -> None:
        self._enter("abort")
        self.aborted.extend(request_ids)
        for request_id in request_ids:
            self.running.pop(request_id, None)

    def reset_caches(self) -> None:
        """Count the call; there are no caches."""
        self._enter("reset_caches")

    def close(self) -> None:
        self.running.clear()
        self.closed = True
        self._enter("close")

    def _enter(self, call: str) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(f"{call}() was called outside the thread that built the engine.")
        self._factory.enter(call)

    def _answer(self, turns: Sequence[Turn]) -> str:
        answers = self._factory.answers
        if isinstance(answers, str):
            return answers
        if callable(answers):
            return answers(turns)
        answer = answers.get(turns[-1].text, answers.get(""))
        if answer is None:
            raise PromptError('The fake engine has no answer to this question; add it, or "".')
        return answer


class _Request:
    """A request that is being answered."""

    def __init__(self, pieces: Sequence[str], sampling: Sampling, max_tokens: int) -> None:
        self._pieces, self._sampling, self._max_tokens = pieces, sampling, max_tokens
        self._tokens = 0
        self._text = ""
        self._shown = 0

    def step(self, request_id: str) -> Update:
        sampling = self._sampling
        endless = sampling.ignore_eos and self._pieces
        ended = not endless and self._tokens >= len(self._pieces)
        piece = "" if ended else self._pieces[self._tokens % len(self._pieces)]
        token = _END_OF_TEXT if ended else _token(piece)
        self._tokens += 1
        self._text += piece
        reason = "stop" if ended else "length" if self._tokens >= self._max_tokens else None
        end, stopped = len(self._text), None
        if places := [(self._text.index(one), one) for one in sampling.stop if one in self._text]:
            reason, (end, stopped) = "stop", min(places)
        elif reason is None and sampling.stop:
            # Hold back text that may be the beginning of a stop string.
            end = max(self._shown, end - max(map(len, sampling.stop)) + 1)
        text, self._shown = self._text[self._shown : end], end
        update = Update(request_id, text, (token,), None, None, reason, 0, stopped)
        scored = [*sampling.logprob_token_ids, *range(1, sampling.logprobs or 0)]
        if not scored and not sampling.logprobs:
            return update
        logprobs = {one: math.log(0.9 if one == token else 0.001) for one in [token, *scored]}
        return update._replace(logprobs=[logprobs[token]], top_logprobs=[logprobs])


def _token(piece: str) -> int:
    return 1 + zlib.crc32(piece.encode()) % 0xFFFF
