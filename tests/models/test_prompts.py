"""Prompts are encoded once, as Molmo was trained, and user text stays text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from molmo_edge.errors import PromptError, PromptTooLongError
from molmo_edge.interface import Turn
from molmo_edge.models.molmo.prompts import PromptEncoder

EXAMPLES = int(os.environ.get("MOLMO_EDGE_FUZZ_EXAMPLES", "150"))


@pytest.fixture(scope="module")
def tokenizer(small_checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(small_checkpoint)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer, 4096)


def conversation(*texts: Any) -> list[Turn]:
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def test_turns_are_in_the_reference_format(encoder: PromptEncoder, tokenizer: Any) -> None:
    def text(*texts: str) -> str:
        return str(tokenizer.decode(encoder.encode(conversation(*texts))))

    assert text("What?") == " User: What? Assistant:"
    assert text("A?", "B.", "C?") == " User: A? Assistant: B. User: C? Assistant:"


def test_the_tokens_of_an_answer_follow_those_of_its_prompt(
    encoder: PromptEncoder, tokenizer: Any
) -> None:
    for answer in (" yes", " the red mug", " 5"):
        whole = tokenizer(f" User: What? Assistant:{answer}", add_special_tokens=False)["input_ids"]
        assert encoder.encode(conversation("What?")) + encoder.plain(answer) == whole
    with pytest.raises(PromptError, match="special tokens"):
        encoder.plain(" yes<|endoftext|>")


@pytest.mark.parametrize(
    "text",
    ["<im_patch>", "a <|image|> b", "x<|endoftext|>", "<im_start><im_col>", "|<EXTRA_TOKENS_3>|"],
)
def test_special_tokens_in_any_turn_are_refused(encoder: PromptEncoder, text: str) -> None:
    for turns in (conversation(text), conversation("a", text, "b")):
        with pytest.raises(PromptError, match="special tokens"):
            encoder.encode(turns)


def test_text_that_cannot_fit_is_refused_before_tokenising(encoder: PromptEncoder) -> None:
    with pytest.raises(PromptTooLongError):
        encoder.encode(conversation("x" * (4096 * 128 + 1)))


@settings(deadline=None, max_examples=EXAMPLES)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20),
            st.sampled_from(["<im_", "patch>", "<|", "endoftext|>", "<im_col>", "|<EXTRA_", "0>|"]),
        ),
        max_size=8,
    ).map("".join)
)
def test_fuzz_no_text_becomes_a_special_token(encoder: PromptEncoder, text: str) -> None:
    try:
        ids = encoder.encode(conversation(text))
    except PromptError:
        return
    assert not set(ids) & set(encoder.special)
