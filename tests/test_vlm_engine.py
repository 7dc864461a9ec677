"""`EdgeVLM` on the real engine: what it answers, and that bad input disturbs nothing."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from molmo_edge import EdgeVLM, Request
from molmo_edge.engine.vllm_engine import release_memory
from molmo_edge.errors import (
    ConfigError,
    ImageError,
    InputError,
    ModelError,
    PromptError,
    PromptTooLongError,
    SamplingError,
)
from molmo_edge.images import load
from molmo_edge.interface import Turn
from molmo_edge.models.molmo.stub import TEXT
from molmo_edge.models.molmo.tiling import tiling_for

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_stub_says_what_it_is(stub_vlm: EdgeVLM, photo: np.ndarray) -> None:
    result = stub_vlm.query(photo, "What is on the table?", logprobs=2)
    assert result.text == TEXT
    assert result.finish_reason == "stop"
    assert result.logprobs is not None
    assert result.top_logprobs is not None
    assert len(result.logprobs) == len(result.token_ids) == len(result.top_logprobs)
    for token, logprob, top in zip(
        result.token_ids, result.logprobs, result.top_logprobs, strict=True
    ):
        assert top[token] == logprob
        assert logprob <= 0
    assert stub_vlm.environment["random_weights"] is True
    assert {"vllm", "torch", "transformers"} <= set(result.environment or {})


def test_the_parts_of_the_start_are_known_and_add_up(stub_vlm: EdgeVLM) -> None:
    seconds = {name: value for name, value in stub_vlm.startup.items() if value is not None}
    assert seconds.keys() == stub_vlm.startup.keys()
    assert seconds["weights"] > 0 and seconds["profile"] > 0
    assert seconds["compile"] == 0  # the CPU profile is eager
    parts = sum(seconds[name] for name in ("weights", "compile", "profile", "warmup"))
    assert parts < seconds["engine"]
    whole = seconds["config"] + seconds["imports"] + seconds["engine"]
    assert seconds["total"] == pytest.approx(whole)


def test_metrics_add_up(stub_vlm: EdgeVLM, photo: np.ndarray) -> None:
    metrics = stub_vlm.query(photo, "Describe this.", max_tokens=9, ignore_eos=True).metrics
    assert metrics.output_tokens == 9
    assert len(metrics.itl_s) == 8
    assert metrics.image_tokens == 316
    assert metrics.prompt_tokens is not None
    assert metrics.prompt_tokens > 316
    assert metrics.cached_tokens == 0
    assert metrics.ttft_s is not None
    assert metrics.e2e_s is not None
    assert metrics.preprocess_s is not None
    assert metrics.preprocess_s < metrics.ttft_s < metrics.e2e_s
    assert metrics.ttft_s + sum(metrics.itl_s) == pytest.approx(metrics.e2e_s)
    assert metrics.output_tps == pytest.approx(8 / sum(metrics.itl_s))
    assert metrics.request_tps == pytest.approx(9 / metrics.e2e_s)


def test_text_alone_and_chat_are_answered(stub_vlm: EdgeVLM, photo: np.ndarray) -> None:
    assert stub_vlm.query(None, "Write a haiku.").text == TEXT
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": photo}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "Where?"},
    ]
    assert stub_vlm.chat(messages).text == TEXT


def test_stop_texts_and_lengths_end_answers(stub_vlm: EdgeVLM) -> None:
    assert stub_vlm.query(None, "x", stop=" stub").text == "This is the molmo_edge"
    cut = stub_vlm.query(None, "x", max_tokens=3)
    assert (cut.text, cut.finish_reason) == ("This is the", "length")


def test_a_picture_decoded_smaller_keeps_the_crops_of_the_whole(stub_vlm: EdgeVLM) -> None:
    small = load(np.zeros((220, 300, 3), np.uint8))

    def tokens(*sizes: tuple[int, int]) -> int | None:
        turn = Turn("user", "x", (small,), sizes)
        found: int | None = stub_vlm.in_engine_thread(lambda e: e.render([turn], {}).image_tokens)
        return found

    whole = tiling_for(880, 1200, stub_vlm.settings.max_crops).n_tokens
    assert tokens((1200, 880)) == whole != tokens()


def test_max_crops_of_one_request_is_honoured(stub_vlm: EdgeVLM) -> None:
    big = np.zeros((900, 1200, 3), np.uint8)
    assert stub_vlm.query(big, "x").metrics.image_tokens == 1196
    assert stub_vlm.query(big, "x", max_crops=1).metrics.image_tokens == 316


def test_batches_keep_order_and_one_failure_stays_one(stub_vlm: EdgeVLM, photo: Any) -> None:
    results = stub_vlm.batch(
        [
            Request(photo, "a", max_tokens=2),
            Request(b"no picture", "b"),
            Request(None, "c", max_tokens=4),
        ],
        return_exceptions=True,
    )
    assert [getattr(r, "text", None) for r in results] == ["This is", None, "This is the molmo"]
    assert isinstance(results[1], ImageError)


def test_scores_are_those_of_generation(stub_vlm: EdgeVLM, photo: np.ndarray) -> None:
    result = stub_vlm.query(photo, "x", max_tokens=5, logprobs=1)
    score = stub_vlm.score(photo, "x", result.token_ids, candidates=[[0, 1]] * 5)
    assert score.logprobs == pytest.approx(result.logprobs, abs=1e-2)
    assert all(set(c) == {0, 1} for c in score.candidates)
    assert len(score.prompt_token_ids) == result.metrics.prompt_tokens


@pytest.mark.parametrize(
    ("image", "text", "options", "error"),
    [
        (None, "", {}, PromptError),
        (None, "see <im_patch>", {}, PromptError),
        (None, "see <|image|>", {}, PromptError),
        (None, "<|endoftext|>", {}, PromptError),
        (None, 3, {}, PromptError),
        (None, "x " * 4000, {}, PromptTooLongError),
        (b"GIF89a", "x", {}, ImageError),
        ("missing.jpg", "x", {}, ImageError),
        ("https://example.com/a.jpg", "x", {}, ImageError),
        (np.zeros((2, 2)), "x", {}, ImageError),
        (None, "x", {"temperature": math.nan}, SamplingError),
        (None, "x", {"temperature": -1}, SamplingError),
        (None, "x", {"top_p": 2}, SamplingError),
        (None, "x", {"max_tokens": 0}, SamplingError),
        (None, "x", {"max_crops": 99}, SamplingError),
        (None, "x", {"temprature": 0}, SamplingError),
    ],
)
def test_bad_input_is_refused_and_the_next_request_works(
    stub_vlm: EdgeVLM, image: Any, text: Any, options: dict[str, Any], error: type[InputError]
) -> None:
    with pytest.raises(error):
        stub_vlm.query(image, text, **options)
    assert stub_vlm.query(None, "x", max_tokens=2).text == "This is"


def test_a_second_picture_is_refused(stub_vlm: EdgeVLM, photo: np.ndarray) -> None:
    part = {"type": "image", "image": photo}
    content = [part, part, {"type": "text", "text": "x"}]
    with pytest.raises(ImageError, match="single images"):
        stub_vlm.chat([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"model": "no/such/folder"}, ModelError, "not a folder"),
        ({"precision": "int3"}, ConfigError, "precision"),
        ({"max_model_len": -1}, ConfigError, "max_model_len"),
        ({"engine_args": {"trust_remote_code": True}}, ConfigError, "no code"),
        ({"engine_args": {"tensor_parallel_size": 2}}, ConfigError, "one device"),
        ({"engine_args": {"max_num_batched_token": 9}}, ConfigError, "max_num_batched_tokens"),
    ],
)
def test_bad_settings_are_refused_by_name(
    cache_dir: Path, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        EdgeVLM(cache_dir=cache_dir, **arguments)


def test_two_engines_live_in_one_process(stub_vlm: EdgeVLM, cache_dir: Path) -> None:
    with EdgeVLM(cache_dir=cache_dir, max_model_len=512, kv_cache_memory_gb=0.1) as second:
        assert second.query(None, "x", max_tokens=3).text == "This is the"
        assert stub_vlm.query(None, "x", max_tokens=3).text == "This is the"
    # Closing one must not take away what the other shares with it.
    assert stub_vlm.query(None, "x", max_tokens=3).text == "This is the"


def test_rendering_leaves_no_thread_pool_behind(stub_vlm: EdgeVLM) -> None:
    """A second OpenMP pool would halve the engine's speed on a CPU."""
    big = np.zeros((900, 1200, 3), np.uint8)
    stub_vlm.query(big, "x", max_tokens=1)
    counts = []

    def ask() -> None:
        counts.append(psutil.Process().num_threads())
        stub_vlm.query(big, "x", max_tokens=1)
        counts.append(psutil.Process().num_threads())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert counts[1] <= counts[0]


def test_a_closed_engine_gives_its_memory_back(stub_vlm: EdgeVLM, cache_dir: Path) -> None:
    def own() -> int:
        memory = psutil.Process().memory_info()
        return int(memory.rss - memory.shared)

    stub_vlm.query(None, "x", max_tokens=1)  # the first engine also brings the libraries
    release_memory()  # what other tests left would be taken first
    before = own()
    with EdgeVLM("stub", cache_dir=cache_dir, max_model_len=1024, kv_cache_memory_gb=0.1) as vlm:
        vlm.query(None, "x", max_tokens=1)
        taken = own() - before
    assert taken > 500 << 20
    assert own() - before < taken / 4
