"""Gemma 3 gives the answers of transformers' own model, and refuses what it cannot take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.errors import ImageError, ModelError, PromptError, PromptTooLongError, SamplingError
from molmo_edge.interface import Renderer, Turn
from molmo_edge.models.gemma3 import control_tokens
from molmo_edge.models.registry import family_of
from tests.models import gemma3_checkpoint as tiny

pytestmark = pytest.mark.slow

MAX_TOKENS = 12
# Float32 against float32: rounding alone. Causal attention inside images is off by 0.2.
BOUND = 1e-4
QUESTION = "what is in the picture?"


def photo(width: int, height: int, seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


WIDE, TALL, SMALL = photo(300, 80, 1), photo(90, 210, 2), photo(20, 30, 3)


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
    "three images, one size": [user(QUESTION, TALL, photo(90, 210, 4), photo(90, 210, 5))],
    "turns": [
        user("what is in the first picture?", SMALL),
        model("A red mug."),
        user("and in the second, and in that?", TALL, WIDE),
        model("The table.\n\nAnd a mug."),
        user("what is it of?"),
    ],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_gemma3(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def vlm(directory: Path) -> Iterator[EdgeVLM]:
    with EdgeVLM(
        directory,
        engine="process",
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_memory_gb=0.1,
        enable_prefix_caching=True,
        enforce_eager=True,
        engine_args={
            "limit_mm_per_prompt": {"image": 3},
            # Images fit a step of 64 tokens, most conversations do not; blocks end inside images.
            "max_num_batched_tokens": 64,
            "block_size": 32,
        },
    ) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def expected(directory: Path) -> dict[str, tuple[list[int], list[int], list[float]]]:
    """Prompt, greedy tokens and their log-probabilities, by transformers alone."""
    from transformers import AutoProcessor, Gemma3ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(directory)
    reference = Gemma3ForConditionalGeneration.from_pretrained(directory, dtype="float32").eval()

    def answer(messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int], list[float]]:
        inputs = processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
        )
        out = reference.generate(
            **inputs,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt = inputs["input_ids"][0].tolist()
        ids = out.sequences[0][len(prompt) :].tolist()
        rows = zip(ids, out.logits, strict=True)
        return prompt, ids, [float(logits[0].log_softmax(-1)[i]) for i, logits in rows]

    return {name: answer(messages) for name, messages in CONVERSATIONS.items()}


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_answers_are_those_of_transformers_alone_together_and_cached(
    vlm: EdgeVLM, expected: Mapping[str, Any]
) -> None:
    def check(name: str) -> None:
        prompt, ids, logprobs = expected[name]
        result = vlm.chat(CONVERSATIONS[name], max_tokens=MAX_TOKENS, logprobs=1)
        assert result.metrics.prompt_tokens == len(prompt), name
        assert list(result.token_ids) == ids, name
        assert result.logprobs is not None
        assert np.abs(np.array(result.logprobs) - logprobs).max() < BOUND, name

    for name in CONVERSATIONS:
        check(name)
    with ThreadPoolExecutor(len(CONVERSATIONS)) as pool:
        list(pool.map(check, CONVERSATIONS))
    assert vlm.chat(CONVERSATIONS["turns"], max_tokens=1).metrics.cached_tokens
    # The same text after another image shares nothing but what stands before it.
    assert vlm.query(SMALL, QUESTION, max_tokens=1).metrics.cached_tokens == 0
    # Ends of turn end the answer, and are no part of it.
    stopped = [name for name, (_, ids, _) in expected.items() if ids[-1] in tiny.ENDS]
    assert stopped, "choose another seed"
    result = vlm.chat(CONVERSATIONS[stopped[0]], max_tokens=MAX_TOKENS)
    assert result.finish_reason == "stop" and "<e" not in result.text
    # Scoring an answer gives its own log-probabilities.
    prompt, ids, logprobs = expected["one image"]
    score = vlm.score(WIDE, QUESTION, ids)
    assert list(score.prompt_token_ids) == prompt
    assert np.abs(np.array(score.logprobs) - logprobs).max() < BOUND
    assert [vlm.supports(verb) for verb in ("chat", "caption", "point", "count")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert vlm.environment["max_crops"] is None


@pytest.fixture(scope="module")
def renderer(directory: Path) -> Renderer:
    """The family's renderer on vLLM's configuration and renderer, without an engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config

    family = family_of({"model_type": "gemma3"})
    family.prepare()
    args = {**family.engine_args(1, "torch", 0), "limit_mm_per_prompt": {"image": 3}}
    config = EngineArgs(str(directory), dtype="float32", max_model_len=512, **args)
    vllm_config = config.create_engine_config()
    renderer = renderer_from_config(vllm_config)
    engine = SimpleNamespace(
        vllm_config=vllm_config,
        model_config=vllm_config.model_config,
        renderer=renderer,
        get_tokenizer=renderer.get_tokenizer,
    )
    return family.renderer(engine, 12, "torch")


def test_image_tokens_are_counted(renderer: Renderer) -> None:
    # Start, end, and the line breaks around each; those between two images are one token.
    around = tiny.IMAGE_TOKENS + 4
    for images, count in (((), 0), ((SMALL,), around), ((WIDE, TALL), 2 * around - 1)):
        assert renderer.render([Turn("user", QUESTION, images)], {}).image_tokens == count


@pytest.mark.parametrize("token", tiny.SPECIAL)
@pytest.mark.parametrize("where", ["{}", "what is {} this", "x\n{}y"])
def test_user_text_cannot_contain_special_tokens(
    renderer: Renderer, token: str, where: str
) -> None:
    text = where.format(token)
    for turns in (
        [Turn("user", text, (SMALL,))],
        [Turn("user", text), Turn("assistant", "a mug"), Turn("user", "and that?")],
        [Turn("user", "what?"), Turn("assistant", text), Turn("user", "and that?")],
    ):
        with pytest.raises(PromptError, match="special tokens") as caught:
            renderer.render(turns, {})
        assert token in str(caught.value)


def test_unflagged_control_tokens_are_recognised_and_plain_ones_left_alone() -> None:
    class Token(str):
        special = False

    names = ["\n\n", "▁▁", "</h1>", "<b>", "<mask>", "<unused7>", "[@BOS@]"]
    tokenizer = SimpleNamespace(added_tokens_decoder=dict(enumerate(map(Token, names))))
    assert set(control_tokens(tokenizer).values()) == {"<mask>", "<unused7>", "[@BOS@]"}


@pytest.mark.parametrize(
    ("turns", "options", "error", "message"),
    [
        ([Turn("user", "  \n")], {}, PromptError, "empty"),
        ([Turn("user", "\ud800")], {}, PromptError, "Unicode"),
        ([Turn("user", "x"), Turn("user", "y")], {}, PromptError, "alternate"),
        ([Turn("user", "x " * 300)], {}, PromptTooLongError, "max_model_len"),
        ([Turn("user", "x" * 10_000_000)], {}, PromptTooLongError, "max_model_len"),
        ([Turn("user", "x " * 230, (SMALL, TALL, WIDE))], {}, PromptTooLongError, "3 image"),
        ([Turn("user", "x", (SMALL,) * 4)], {}, ImageError, "4 images; the engine takes 3"),
        ([Turn("user", "x", (SMALL,))], {"max_crops": 2}, SamplingError, "crops"),
    ],
)
def test_unusable_requests_are_refused(
    renderer: Renderer,
    turns: list[Turn],
    options: Mapping[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        renderer.render(turns, options)
    # The same text fits without its images.
    assert renderer.render([Turn("user", "x " * 230)], {}).prompt_tokens


def test_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vision_config"):
        family_of({"model_type": "gemma3"}).check(
            {"model_type": "gemma3", "text_config": {}}, tmp_path, "dummy"
        )
    config = {"model_type": "gemma3", "text_config": {}, "vision_config": {}}
    with pytest.raises(ModelError, match="safetensors"):
        family_of(config).check(config, tmp_path, "auto")
