"""Drafts of forced tokens: what is proposed, and that no answer changes."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from molmo_edge import CountResult, EdgeVLM
from molmo_edge.bench.accuracy import questions
from molmo_edge.models import hub
from molmo_edge.models.drafter import DRAFT_TOKENS, FormatProposer, expect_json, forced_text

MOLMO = (
    ' Counting the <points x1="12.3" y1="45.6" x2="22.3" y2="5.6" x3="33.1" y3="50.0" x4="61.3" '
    'y4="45.6" x5="63.7" y5="8.0" x6="71.3" y6="45.6" x7="81.3" y7="45.1" x8="91.2" y8="45.6" '
    'alt="red mugs">red mugs</points> shows a total of 8.'
)
ONE = ' <point x="12.3" y="45.6" alt="red mug">red mug</point>'
MOLMO2 = (
    'Counting the <points coords="1 1 123 456 2 234 567 3 345 040 4 347 222;2 5 010 007 6 1000 333'
    '">red mugs</points> shows a total of 6.'
)
TRACKS = (
    '<tracks coords="0.0 1 123 456 2 234 567;0.5 1 345 040 2 347 222;1.0 1 347 222 2 123 123;'
    '1.5 1 347 222 2 123 123">red mugs</tracks>'
)
PROSE = (
    "There are 12 mugs, e.g. 3 of 100; x = 5. The longest of 123 456 789 is 12.5 cm, "
    '"not" a < b. 1 1 is no point; a total of 7.'
)
# Pre-tokenizers: a digit each, up to three digits, a number each.
PATTERNS = {
    "qwen": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+",
    "cl100k": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+(?!\S)|\s+",
    "gpt-neox": r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


class Tokenizer:
    """Every piece of `texts` that the pattern splits off is one token; other text is bytes."""

    def __init__(self, pattern: str, texts: list[str]) -> None:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        from molmo_edge.models.synthetic import vocabulary

        split = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        pieces = [piece for text in texts for piece, _ in split.pre_tokenize_str(text)]
        model = models.BPE(vocab=vocabulary(pieces), merges=[], ignore_merges=True)
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = split
        self._tokenizer.decoder = decoders.ByteLevel()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text


def proposer(tokenizer: Any, model_type: str, max_model_len: int = 4096) -> FormatProposer:
    model = SimpleNamespace(
        max_model_len=max_model_len, hf_config=SimpleNamespace(model_type=model_type)
    )
    structured = SimpleNamespace(disable_any_whitespace=True, disable_additional_properties=True)
    config = SimpleNamespace(model_config=model, structured_outputs_config=structured)
    return FormatProposer(config, tokenizer)


def replay(drafter: FormatProposer, tokenizer: Tokenizer, text: str) -> tuple[float, list[str]]:
    """Tokens per step of an answer, and the drafts that were not taken whole."""
    prompt, answer = tokenizer.encode("Where are they? "), tokenizer.encode(text)
    at = steps = 0
    wrong = []
    while at < len(answer):
        row = np.array([prompt + answer[:at]], dtype=np.int32)
        (draft,) = drafter.propose([[1]], np.array([row.size]), row) if at else ([],)
        taken = sum(itertools.takewhile(bool, map(int.__eq__, draft, answer[at:])))
        if taken < len(draft):
            wrong.append(tokenizer.decode(draft))
        at, steps = at + taken + 1, steps + 1
    return len(answer) / steps, wrong


@pytest.mark.parametrize(
    ("pattern", "least"),
    {
        "qwen": {MOLMO: 2.3, ONE: 2.1, MOLMO2: 1.6, TRACKS: 1.6},
        "cl100k": {MOLMO: 2.8, ONE: 2.2, MOLMO2: 2.1, TRACKS: 2.2},
        "gpt-neox": {MOLMO: 2.8, ONE: 2.2},
    }.items(),
)
def test_forced_tokens_are_drafted_as_the_model_writes_them(
    pattern: str, least: dict[str, float]
) -> None:
    tokenizer = Tokenizer(PATTERNS[pattern], [*least, PROSE])
    for text, minimum in least.items():
        drafter = proposer(tokenizer, "molmo2" if "coords" in text else "molmo")
        per_step, wrong = replay(drafter, tokenizer, text)
        assert per_step >= minimum, (text, per_step)
        # Where the form leaves a choice: another point, frame or the end; a third object.
        assert set(wrong) <= {'" x9="', " 1 ", " 3 ", " 5 ", " 7 ", " ", ";"}


def test_no_digit_that_the_model_decides_is_drafted_and_nothing_in_prose() -> None:
    for text in (MOLMO, ONE, MOLMO2, TRACKS):
        coords = "coords" in text
        for end in range(1, len(text) + 1):
            draft = forced_text(text[:end], lambda end=end, text=text: text[:end], coords=coords)  # type: ignore[misc]
            assert not re.search(r"\d", re.sub(r'\d+="|\A \d+ \Z', "", draft)), text[:end]
        assert not any(
            forced_text(PROSE[:end], lambda: PROSE, coords=coords) for end in range(len(PROSE) + 1)
        )


def test_no_text_makes_a_draft_fail() -> None:
    dice = random.Random(5)
    pieces = [
        "<points",
        "<tracks",
        ' coords="',
        ' x1="',
        ' y1="',
        ' alt="',
        '"',
        ">",
        "</",
        ";",
        ".",
    ]
    pieces += [
        " ",
        "1",
        " 1",
        " 12 ",
        "123",
        " 1 123 456",
        "points>",
        " shows a total of",
        "९",
        "a",
    ]
    for _ in range(20_000):
        text = "".join(dice.choices(pieces, k=dice.randint(1, 12)))
        for coords in (False, True):
            forced_text(text, lambda text=text: text, coords=coords)  # type: ignore[misc]


def test_rows_are_independent_and_end_with_the_context() -> None:
    tokenizer = Tokenizer(PATTERNS["qwen"], [MOLMO])
    texts = [' <points x1="12', ' <points x1="12.3', PROSE, ' <points x1="12.3']
    ids = [tokenizer.encode(text) for text in texts]
    rows = np.zeros((len(ids), 400), dtype=np.int32)
    for row, one in zip(rows, ids, strict=True):
        row[: len(one)] = one
    sampled = [[1], [1, 2], [1], []]  # nothing was sampled for a prompt that is not read to its end
    lengths = np.array([len(one) for one in ids])
    drafts = proposer(tokenizer, "molmo").propose(sampled, lengths, rows)
    assert [tokenizer.decode(draft) for draft in drafts] == [".", '" y1="', "", ""]
    full = proposer(tokenizer, "molmo", max_model_len=len(ids[1]) + 2)
    assert [len(draft) for draft in full.propose(sampled, lengths, rows)] == [1, 2, 0, 0]


def test_what_a_schema_forces_is_drafted_whatever_other_requests_did() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(hub.DEMO_DIRECTORY / "tokenizer.json"), eos_token="<|im_end|>"
    )
    prompt = tokenizer.encode("A mug: ")
    expect_json(prompt, SCHEMA)
    drafter = proposer(tokenizer, "molmo2")

    def draft(text: str, before: list[int] = prompt) -> str:
        row = np.array([[*before, *tokenizer.encode(text)]], dtype=np.int32)
        (tokens,) = drafter.propose([[1]], np.array([row.size]), row)
        assert len(tokens) <= DRAFT_TOKENS
        return str(tokenizer.decode(tokens))

    for text in ('{"colour":"red","number":2}', "no JSON", '{"colour":"blue","number":1}'):
        for end in range(1, len(text)):  # the second is a request without a schema
            drafted = draft(text[:end])
            assert text[end:].startswith(drafted) and (drafted or text[end - 1] not in "{,u")
    assert not draft('{"colour', tokenizer.encode("Another prompt: "))


QUESTIONS = [question.request for question in itertools.islice(questions(1, 5), 9)]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "number": {"enum": [1, 2]}},
    "required": ["colour", "number"],
}


def opened(cache_dir: Path, speculation: str) -> EdgeVLM:
    return EdgeVLM(
        "demo", speculation=speculation, engine="process", dtype="float32", max_num_seqs=4,
        max_model_len=1024, kv_cache_memory_gb=0.25, enforce_eager=True, cache_dir=cache_dir,
    )  # fmt: skip


def ask_all(vlm: EdgeVLM) -> list[Any]:
    """Points, counts, tracks, prose and JSON; with stop strings and cut off; four at once."""
    image = QUESTIONS[0].image
    options: list[dict[str, Any]] = [
        {}, {"stop": [" 1 "]}, {"json_schema": SCHEMA}, *({"max_tokens": n} for n in (6, 9, 12)),
    ]  # fmt: skip
    streams = [vlm.stream(image, "Point to the shapes.", logprobs=2, **one) for one in options]
    answers: list[Any] = [*vlm.batch(QUESTIONS), *(stream.result() for stream in streams)]
    answers = [one.points if isinstance(one, CountResult) else one for one in answers]
    return [getattr(one, "result", one) for one in answers]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_drafts_change_no_token_of_any_answer(cache_dir: Path) -> None:
    with opened(cache_dir, "off") as vlm:
        expected = ask_all(vlm)
    assert any("<points" in one.text for one in expected)
    with opened(cache_dir, "format") as vlm:
        assert vlm.environment["speculation"] == "format"
        for tokens in range(3, 7):  # aborted while drafts are pending
            stream = vlm.stream(QUESTIONS[0].image, "Point to the shapes.", ignore_eos=True)
            list(itertools.islice(stream, tokens))
            stream.cancel()
        results = ask_all(vlm)
    for result, other in zip(results, expected, strict=True):
        assert (result.token_ids, result.text) == (other.token_ids, other.text)
        assert result.finish_reason == other.finish_reason
        if other.logprobs:
            assert result.logprobs == pytest.approx(other.logprobs, abs=1e-4)
