"""Drafts of the tokens that the form of an answer dictates (`speculation="format"`).

In ``<points x1="12.3" y1="45.6" …`` the model decides the digits and little else. After each step
vLLM calls `FormatProposer.propose`, which reads the end of every sequence as text and returns the
tokens that must follow. vLLM checks them in its next step: a wrong draft costs time and changes no
answer. Digits of coordinates, times and counts are never drafted; the numbers of points are.
In an answer that follows a JSON Schema it drafts what the schema forces, such as the next key.

Nothing that a request's end could spoil is kept between steps: the texts of tokens, the tokens of
drafts, and how far a JSON answer was read, which is compared with its tokens each time.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

DRAFT_TOKENS = 6
"""Maximum per step: what stands between two coordinates, such as ``" y12="``, and one to spare."""

_TAIL_TOKENS, _COORDS_TAIL_TOKENS = 48, 96  # several points, or frames of a track
_LONGER_TOKENS = 384, 2048  # back to the start of a tag; read at its end

# How a token within a form may end. Few words of prose do.
_ENDS = re.compile(r'(?:[\d.;"=<>/ ]|\b(?:[xy]|alt|coords|points?|tracks|shows|a|total|of))\Z')
_START = re.compile(r"<(points?|tracks)( [^ ]*)?\Z")
_PERCENT = re.compile(r' ([xy])(\d{0,4})="(?:(\d\d)|\d{1,3}\.\d("(?: \w*=?"?)?)?)\Z')
_ALT = re.compile(r' alt="([^"<>]*)("[^"]*)\Z')
_CLOSING = re.compile(r"</([^<]*)\Z")
_X = re.compile(r" \d{1,2} \d{3,4}\Z")
_FRAME = re.compile(r'[;"](\d+)(\.\d)?\Z')
# Numbers of points have fewer digits than their coordinates.
_IDS = re.compile(r";|(?<= )\d{1,2}(?= \d{3,4} \d{3,4})")
_TOTAL = " shows a total of"


def forced_text(tail: str, answer: Callable[[], str], *, coords: bool) -> str:
    """Return the text that follows if the answer keeps to its form; "" where no form says so.

    Args:
        tail: the last characters of a sequence.
        answer: reads back to the start of the tag.
        coords: whether tags have the attribute ``coords``, as Molmo 2's, or ``x1``, ``y1``, …
    """
    before = tail.rstrip("0123456789.; ")
    if not before or before.endswith('coords="'):
        return _in_coords(tail)
    if "<" not in tail and '="' not in tail:
        return ""  # prose
    if match := _PERCENT.search(tail[-40:]):
        axis, number, two_digits, rest = match.groups()
        if two_digits:
            return "."
        after = [f'" y{number}="'] if axis == "x" else ['" alt="']
        if axis == "y" and number:
            after.insert(0, f'" x{int(number) + 1}="')
        return _continued(rest or "", *after)
    if match := _ALT.search(tail):
        label, rest = match.groups()
        if f'">{label}</points>{_TOTAL}'.startswith(rest):
            return _continued(rest, f'">{label}</{_closing(answer())}')
    if match := _CLOSING.search(tail):
        rest = match[1]
        if any(f"{name}>{_TOTAL}".startswith(rest) for name in ("point", "points", "tracks")):
            return _continued(rest, _closing(answer()))
        return "." if re.fullmatch(rf"points>{_TOTAL} \d+", rest) else ""
    if match := _START.search(tail):
        name, rest = match.groups()
        first = ' coords="' if coords else ' x="' if name == "point" else ' x1="'
        return _continued(rest or "", first)
    return ""


def _continued(rest: str, *texts: str) -> str:
    """Return what the first of `texts` that begins with `rest` has after it."""
    return next((text[len(rest) :] for text in texts if text.startswith(rest)), "")


def _closing(answer: str) -> str:
    """Return what follows ``</`` at the end of an answer."""
    start = _tag_start(answer)
    name = re.findall(r"\w+", answer[start : start + 9])
    total = _TOTAL if answer[:start].endswith("Counting the ") else ""
    return f"{name[0]}>{total}" if start >= 0 and name else ""


def _tag_start(text: str) -> int:
    return max(text.rfind("<point"), text.rfind("<tracks"))


def _in_coords(tail: str) -> str:
    """Return what follows within ``coords="frame id x y id x y;frame …``, of which `tail` ends."""
    if _X.search(tail):
        return " "
    ids = _IDS.findall(tail)
    numbers = [int(id) for id in ids if id != ";"]
    if frame := _FRAME.search(tail):
        if not numbers:
            return " 1 "
        times = re.findall(r'[;"](\d+)\.\d ', tail)
        if times and not frame[2]:
            return "." if len(frame[1]) >= len(times[-1]) else ""
    elif not re.search(r" \d{1,2} \d{3,4} \d{3,4}\Z", tail):
        return ""
    if "<tracks" in tail or any(a >= b for a, b in itertools.pairwise(numbers)):
        # A track's number stays: a frame has those of the frame before.
        earlier = [i for i, id in enumerate(ids[:-1]) if id == ids[-1]]
        if earlier:
            following = ids[earlier[-1] + 1]
            return following if following == ";" else f" {following} "
        if ids[-1] == ";":
            return f" {numbers[0]} "
    return f" {numbers[-1] + 1} "


@dataclass
class JsonAnswer:
    """A request whose answer follows a JSON Schema, found again by the tokens of its prompt."""

    prompt: np.ndarray
    schema: Mapping[str, Any]
    matcher: Any = None  # llguidance's, built when it is first needed
    read: list[int] = field(default_factory=list)  # by the matcher

    def follows(self, tokens: np.ndarray) -> bool:
        """Whether `tokens` are the prompt and at least one token of an answer."""
        size = self.prompt.size
        return (
            tokens.size > size
            and tokens[size - 1] == self.prompt[-1]
            and np.array_equal(tokens[:size], self.prompt)
        )


# vLLM tells a proposer nothing about requests but their tokens. The last of this process.
_JSON_ANSWERS: deque[JsonAnswer] = deque(maxlen=32)


def expect_json(prompt: Sequence[int], schema: Mapping[str, Any]) -> None:
    """Draft the answer to this prompt by the schema; call it in the proposer's thread."""
    _JSON_ANSWERS.appendleft(JsonAnswer(np.array(prompt), schema))


class FormatProposer:
    """vLLM's proposer of drafts; it runs in the thread of the model.

    Args:
        vllm_config: vLLM's VllmConfig; its model's context and type are read.
        tokenizer: the model's own if it is not given.
    """

    def __init__(self, vllm_config: Any, tokenizer: Any = None) -> None:
        model = vllm_config.model_config
        if tokenizer is None:
            from vllm.tokenizers import cached_tokenizer_from_config

            tokenizer = cached_tokenizer_from_config(model)
        self._max_model_len = int(model.max_model_len)
        self._structured = vllm_config.structured_outputs_config
        self._tokenizer = tokenizer
        self._coords = model.hf_config.model_type == "molmo2"
        self._tail = _COORDS_TAIL_TOKENS if self._coords else _TAIL_TOKENS
        self._texts: dict[int, str] = {}
        self._ends: dict[int, bool] = {}  # whether a token within a form may be the last
        self._encode = lru_cache(4096)(partial(tokenizer.encode, add_special_tokens=False))

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is none."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Return the drafts of each row of `token_ids_cpu`, none where nothing was sampled."""
        drafts: list[list[int]] = []
        lengths = num_tokens_no_spec[: len(sampled_token_ids)].tolist()
        for row, (sampled, length) in enumerate(zip(sampled_token_ids, lengths, strict=True)):
            most = min(DRAFT_TOKENS, self._max_model_len - length)
            drafts.append(self._draft(token_ids_cpu[row, :length])[:most] if sampled else [])
        return drafts

    def _draft(self, tokens: np.ndarray) -> list[int]:
        for one in _JSON_ANSWERS:
            if one.follows(tokens):
                forced = self._forced_json(one, tokens[one.prompt.size :].tolist())
                if forced is not None:
                    return forced
        last = int(tokens[-1])
        if (ends := self._ends.get(last)) is None:
            ends = self._ends[last] = _ENDS.search(self._text(tokens[-1:])) is not None
        if not ends:
            return []
        tail = self._text(tokens[-self._tail :])

        def answer() -> str:
            text = tail
            for length in _LONGER_TOKENS:
                if _tag_start(text) < 0:
                    text = self._text(tokens[-length:])
            return text

        text = forced_text(tail, answer, coords=self._coords)
        return self._encode(text) if text else []

    def _forced_json(self, one: JsonAnswer, answer: list[int]) -> list[int] | None:
        """Return what the schema forces; None for an answer that does not follow it."""
        if one.matcher is None:
            one.matcher = self._json_matcher(one.schema)
        if answer[: len(one.read)] != one.read:  # of another request with this prompt
            one.matcher.reset()
            one.read = []
        unread = answer[len(one.read) :]
        if one.matcher.try_consume_tokens(unread) < len(unread):
            one.matcher.reset()
            one.read = []
            return None
        one.read = answer
        forced: list[int] = one.matcher.compute_ff_tokens()
        return forced

    def _json_matcher(self, schema: Mapping[str, Any]) -> Any:
        from llguidance import LLMatcher
        from vllm.v1.structured_output.backend_guidance import serialize_guidance_grammar
        from vllm.v1.structured_output.backend_types import StructuredOutputOptions

        grammar = serialize_guidance_grammar(
            StructuredOutputOptions.JSON,
            json.dumps(schema),
            self._structured.disable_any_whitespace,
            self._structured.disable_additional_properties,
        )
        return LLMatcher(self._json_tokenizer, grammar, log_level=0)

    @cached_property
    def _json_tokenizer(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, len(self._tokenizer))

    def _text(self, tokens: np.ndarray) -> str:
        texts, ids = self._texts, tokens.tolist()
        try:
            return "".join([texts[id] for id in ids])
        except KeyError:
            texts.update({id: self._tokenizer.decode([id]) for id in ids if id not in texts})
            return "".join([texts[id] for id in ids])
