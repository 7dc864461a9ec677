"""Gemma 3 through `EdgeVLM`: the answers of transformers' own model, and the same refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.errors import (
    ImageError,
    ModelError,
    PromptError,
    PromptTooLongError,
    SamplingError,
)
from molmo_edge.models.gemma3 import control_tokens
from molmo_edge.models.registry import family_of
from tests.models import gemma3_checkpoint as tiny

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MAX_TOKENS = 12
# Float32 against float32: rounding alone. Pictures that do not see themselves are off by 0.2.
BOUND = 1e-4
QUESTION = "what is in the picture?"


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


WIDE, TALL = picture(300, 80, 1), picture(90, 210, 2)
SMALL = picture(20, 30, 3)


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def model(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CONVERSATIONS: Mapping[str, list[dict[str, Any]]] = {
    "text": [user("what is a red mug? This <b>mug</b>,\n\nand that.")],
    "long text": [user("the first mug of the second table is red, and that is that. " * 4)],
    "one image": [user(QUESTION, WIDE)],
    "two images": [user("what is in the first and in the second?", WIDE, TALL)],
    "three images, one size": [user(QUESTION, TALL, picture(90, 210, 4), picture(90, 210, 5))],
    "turns": [
        user("what is in the first picture?", SMALL),
        model("A red mug."),
        user("and in the second, and in that?", TALL, WIDE),
        model("The table.\n\nAnd a mug."),
        user("what is it of?"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_gemma3(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Iterator[EdgeVLM]:
    with EdgeVLM(
        folder,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_memory_gb=0.1,
        enforce_eager=True,
        engine_args={"limit_mm_per_prompt": {"image": 3}},
    ) as vlm:
        yield vlm


class Reference:
    """transformers' own Gemma 3: its processor, template and greedy generation."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, Gemma3ForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()

    def answer(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], list[int], list[float]]:
        """Prompt, generated tokens and their log-probabilities."""
        inputs = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
        )
        return inputs["input_ids"][0].tolist(), *greedy(self.model, inputs)


def greedy(reference: Any, inputs: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Generated tokens of transformers, and their log-probabilities."""
    out = reference.generate(
        **inputs,
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = out.sequences[0][inputs["input_ids"].shape[1] :].tolist()
    logprobs = [
        float(logits[0].log_softmax(-1)[i]) for i, logits in zip(ids, out.logits, strict=True)
    ]
    return ids, logprobs


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[list[int], list[int], list[float]]]:
    reference = Reference(folder)
    return {name: reference.answer(messages) for name, messages in CONVERSATIONS.items()}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_are_those_of_transformers(
    vlm: EdgeVLM, expected: Mapping[str, Any], name: str
) -> None:
    prompt, ids, logprobs = expected[name]
    result = vlm.chat(CONVERSATIONS[name], max_tokens=MAX_TOKENS, logprobs=1)
    assert result.metrics.prompt_tokens == len(prompt)
    assert list(result.token_ids) == ids
    assert result.logprobs is not None
    assert np.abs(np.array(result.logprobs) - logprobs).max() < BOUND


def test_answers_do_not_depend_on_the_company(
    vlm: EdgeVLM, expected: Mapping[str, Any]
) -> None:
    names = list(CONVERSATIONS)
    with ThreadPoolExecutor(len(names)) as pool:
        results = pool.map(
            lambda name: vlm.chat(CONVERSATIONS[name], max_tokens=MAX_TOKENS, logprobs=1), names
        )
        for name, result in zip(names, results, strict=True):
            _, ids, logprobs = expected[name]
            assert list(result.token_ids) == ids, name
            assert np.abs(np.array(result.logprobs) - logprobs).max() < BOUND, name


def test_scoring_an_answer_gives_its_own_logprobs(
    vlm: EdgeVLM, expected: Mapping[str, Any]
) -> None:
    prompt, ids, logprobs = expected["one image"]
    score = vlm.score(WIDE, QUESTION, ids)
    assert list(score.prompt_token_ids) == prompt
    assert np.abs(np.array(score.logprobs) - logprobs).max() < BOUND


def test_image_tokens_are_counted(vlm: EdgeVLM) -> None:
    # Start, end, and the line breaks around each; those between two pictures are one token.
    around = tiny.IMAGE_TOKENS + 4
    assert vlm.query(None, QUESTION, max_tokens=1).metrics.image_tokens == 0
    assert vlm.query(SMALL, QUESTION, max_tokens=1).metrics.image_tokens == around
    two = vlm.chat(CONVERSATIONS["two images"], max_tokens=1)
    assert two.metrics.image_tokens == 2 * around - 1


def test_the_end_of_turn_ends_the_answer(vlm: EdgeVLM, expected: Mapping[str, Any]) -> None:
    ends = {tiny.SPECIAL.index("<eos>"), tiny.SPECIAL.index(tiny.END_OF_TURN)}
    stopped = [name for name, (_, ids, _) in expected.items() if ids[-1] in ends]
    assert stopped, "choose another seed"
    for name in stopped:
        result = vlm.chat(CONVERSATIONS[name], max_tokens=MAX_TOKENS)
        assert result.finish_reason == "stop"
        assert "<e" not in result.text


@pytest.mark.parametrize("token", tiny.SPECIAL)
@pytest.mark.parametrize("where", ["{}", "what is {} this", "x\n{}y"])
def test_user_text_cannot_hold_special_tokens(vlm: EdgeVLM, token: str, where: str) -> None:
    with pytest.raises(PromptError, match="special tokens") as caught:
        vlm.query(SMALL, where.format(token))
    assert token in str(caught.value)


def test_an_earlier_turn_cannot_hold_special_tokens(vlm: EdgeVLM) -> None:
    for role in ("user", "assistant"):
        turns = [user("what is this?", SMALL), model("a mug"), user("and that?")]
        turns[role == "assistant"]["content"][-1]["text"] = "<start_of_image>"
        with pytest.raises(PromptError, match="special tokens"):
            vlm.chat(turns)


def test_unflagged_control_tokens_are_found_and_plain_ones_left_alone() -> None:
    class Token(str):
        special = False

    class Tokenizer:
        added_tokens_decoder: Mapping[int, Any] = dict(
            enumerate(map(Token, ["\n\n", "▁▁", "</h1>", "<b>", "<mask>", "<unused7>", "[@BOS@]"]))
        )

    assert set(control_tokens(Tokenizer()).values()) == {"<mask>", "<unused7>", "[@BOS@]"}


@pytest.mark.parametrize("text", ["", "  \n", "\ud800"])
def test_texts_that_cannot_be_used_are_refused(vlm: EdgeVLM, text: str) -> None:
    with pytest.raises(PromptError):
        vlm.query(None, text)


def test_turns_out_of_order_are_refused(vlm: EdgeVLM) -> None:
    with pytest.raises(PromptError, match="alternate"):
        vlm.chat([user("x"), user("y")])


def test_too_long_prompts_are_refused_before_the_engine(vlm: EdgeVLM) -> None:
    for text in ("x " * 300, "x" * 10_000_000):
        with pytest.raises(PromptTooLongError, match="max_model_len"):
            vlm.query(None, text)
    # Fits without its pictures.
    fits = "x " * 230
    assert vlm.query(None, fits, max_tokens=1).metrics.prompt_tokens > 460
    with pytest.raises(PromptTooLongError, match="3 image"):
        vlm.chat([user(fits, SMALL, TALL, WIDE)])


def test_too_many_images_are_refused(vlm: EdgeVLM) -> None:
    with pytest.raises(ImageError, match="4 images; the engine takes 3"):
        vlm.chat([user("x", SMALL, SMALL, SMALL, SMALL)])


def test_max_crops_is_refused(vlm: EdgeVLM) -> None:
    with pytest.raises(SamplingError, match="crops"):
        vlm.query(SMALL, "x", max_crops=2)
    assert vlm.environment["max_crops"] is None


def test_it_does_not_point(vlm: EdgeVLM) -> None:
    assert [vlm.supports(verb) for verb in ("query", "chat", "caption")] == [True] * 3
    assert not vlm.supports("point")
    assert not vlm.supports("count")
    assert vlm.family is not None
    assert vlm.family.name == "gemma3"


def test_the_engine_is_well_after_all_of_this(vlm: EdgeVLM) -> None:
    assert vlm.state == "ready"
    assert vlm.query(WIDE, QUESTION, max_tokens=1).token_ids


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vision_config"):
        family_of({"model_type": "gemma3"}).check(
            {"model_type": "gemma3", "text_config": {}}, tmp_path, "dummy"
        )
    with pytest.raises(ModelError, match="safetensors"):
        family_of({"model_type": "gemma3_text"}).check({}, tmp_path, "auto")


def test_checkpoints_without_vision_read_text_alone(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM

    folder = tiny.write_gemma3_text(tmp_path / "text")
    reference = Gemma3ForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with EdgeVLM(
        folder,
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_gb=0.1,
        enforce_eager=True,
    ) as vlm:
        result = vlm.query(None, QUESTION, max_tokens=MAX_TOKENS, logprobs=1)
        prompt = vlm.score(None, QUESTION, result.token_ids[:1]).prompt_token_ids
        ids, logprobs = greedy(reference, {"input_ids": torch.tensor([prompt])})
        assert list(result.token_ids) == ids
        assert result.logprobs is not None
        assert np.abs(np.array(result.logprobs) - logprobs).max() < BOUND
        assert result.metrics.image_tokens == 0
        assert vlm.supports("chat")
        assert not vlm.supports("caption")
        with pytest.raises(ImageError, match="text alone"):
            vlm.query(SMALL, QUESTION)


def test_short_steps_and_the_prefix_cache_change_nothing(
    folder: Path, expected: Mapping[str, Any]
) -> None:
    with EdgeVLM(
        folder,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=2,
        kv_cache_memory_gb=0.1,
        enable_prefix_caching=True,
        # Pictures fit a step of 64 tokens, most conversations do not; blocks end inside pictures.
        enforce_eager=True,
        engine_args={"max_num_batched_tokens": 64, "block_size": 32},
    ) as vlm:
        for _ in range(2):
            for name, (_, ids, logprobs) in expected.items():
                result = vlm.chat(CONVERSATIONS[name], max_tokens=MAX_TOKENS, logprobs=1)
                assert list(result.token_ids) == ids, name
                assert np.abs(np.array(result.logprobs) - logprobs).max() < BOUND, name
        again = vlm.chat(CONVERSATIONS["turns"], max_tokens=1)
        assert again.metrics.cached_tokens
        # The same words behind another picture share nothing but what stands before it.
        assert vlm.query(SMALL, QUESTION, max_tokens=1).metrics.cached_tokens == 0
