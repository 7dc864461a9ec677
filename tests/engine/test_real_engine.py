"""`EdgeVLM` on vLLM, in the engine's thread and in a process of its own."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import psutil
import pytest
from pydantic import BaseModel, Field

from molmo_edge import EdgeVLM, Request
from molmo_edge.errors import (
    ConfigError,
    GenerationError,
    ImageError,
    InputError,
    ModelError,
    PromptError,
    PromptTooLongError,
    RequestCancelled,
    RequestTimeout,
    SamplingError,
)
from molmo_edge.models.molmo.synthetic import TEXT
from tests.engine.support import in_threads

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_stub_answers_with_logprobs(real_vlm: EdgeVLM, photo: np.ndarray) -> None:
    result = real_vlm.query(photo, "What is on the table?", logprobs=2)
    assert (result.text, result.finish_reason) == (TEXT, "stop")
    assert result.logprobs is not None and result.top_logprobs is not None
    for token, logprob, top in zip(
        result.token_ids, result.logprobs, result.top_logprobs, strict=True
    ):
        assert top[token] == logprob <= 0
        assert len(top) == 2
    assert real_vlm.environment["random_weights"] is True
    assert {"vllm", "torch", "transformers"} <= set(result.environment or {})


def test_both_engines_give_the_same_answers(
    stub_vlm: EdgeVLM, process_vlm: EdgeVLM, photo: np.ndarray
) -> None:
    assert stub_vlm.environment["engine"] == "thread"
    assert process_vlm.environment["engine"] == "process"
    for image, question in ((photo, "What is on the table?"), (None, "Tell a story.")):
        options = {"max_tokens": 24, "ignore_eos": True, "logprobs": 3}
        one, other = (vlm.query(image, question, **options) for vlm in (stub_vlm, process_vlm))
        assert one.token_ids == other.token_ids
        assert one.text == other.text
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_parts_of_the_start_add_up(stub_vlm: EdgeVLM, process_vlm: EdgeVLM) -> None:
    for vlm in (stub_vlm, process_vlm):
        seconds = vlm.startup
        parts = [seconds[name] for name in ("config", "imports", "engine")]
        assert all(part is not None for part in parts)
        assert seconds["total"] == pytest.approx(sum(parts))  # type: ignore[arg-type]
    assert stub_vlm.startup["compile"] == 0  # the CPU profile is eager
    assert process_vlm.startup["compile"] is None


def test_metrics_add_up(real_vlm: EdgeVLM, photo: np.ndarray) -> None:
    metrics = real_vlm.query(photo, "Describe this.", max_tokens=9, ignore_eos=True).metrics
    assert (metrics.output_tokens, metrics.image_tokens, metrics.cached_tokens) == (9, 316, 0)
    assert metrics.prompt_tokens is not None and metrics.prompt_tokens > 316
    assert metrics.ttft_s is not None and metrics.e2e_s is not None
    assert metrics.preprocess_s is not None
    assert metrics.preprocess_s < metrics.ttft_s < metrics.e2e_s
    assert len(metrics.itl_s) == 8
    assert metrics.ttft_s + sum(metrics.itl_s) == pytest.approx(metrics.e2e_s)


def test_text_alone_chat_stop_strings_and_lengths(real_vlm: EdgeVLM, photo: np.ndarray) -> None:
    assert real_vlm.query(None, "Write a haiku.").text == TEXT
    content = [{"type": "image", "image": photo}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "Where?"},
    ]
    assert real_vlm.chat(messages).text == TEXT
    stopped = real_vlm.query(None, "x", stop=" stub")
    assert (stopped.text, stopped.finish_reason) == ("This is the molmo_edge", "stop")
    cut = real_vlm.query(None, "x", max_tokens=3)
    assert (cut.text, cut.finish_reason) == ("This is the", "length")


def test_streams_at_once_each_get_their_own_answer(real_vlm: EdgeVLM, photo: np.ndarray) -> None:
    start = threading.Barrier(8)

    def caller(i: int) -> None:
        start.wait()
        image = photo if i == 0 else None
        stream = real_vlm.stream(image, f"question {i}", max_tokens=3 + i, logprobs=1)
        deltas = list(stream)
        result = stream.result()
        assert "".join(deltas) == result.text
        assert TEXT.startswith(result.text)
        assert len(result.token_ids) == len(result.logprobs or ()) == 3 + i

    in_threads([lambda i=i: caller(i) for i in range(8)])  # type: ignore[misc]


def test_a_cancelled_stream_and_a_deadline_leave_the_next_answer_right(
    real_vlm: EdgeVLM,
) -> None:
    for _ in range(3):
        stream = real_vlm.stream(None, "noise", ignore_eos=True, max_tokens=1500)
        next(stream)
        stream.cancel()
        with pytest.raises(RequestCancelled):
            stream.result()
        assert real_vlm.query(None, "x").text == TEXT
    with pytest.raises(RequestTimeout):
        real_vlm.query(None, "noise", ignore_eos=True, max_tokens=2000, timeout=0.5)
    real_vlm.reset_caches()
    assert real_vlm.query(None, "x").text == TEXT


def test_scores_are_those_of_generation(real_vlm: EdgeVLM) -> None:
    result = real_vlm.query(None, "x", max_tokens=5, logprobs=1)
    score = real_vlm.score(None, "x", result.token_ids, candidates=[[0, 1]] * 5)
    assert score.logprobs == pytest.approx(result.logprobs, abs=1e-2)
    assert all(set(c) == {0, 1} for c in score.candidates)
    assert len(score.prompt_token_ids) == result.metrics.prompt_tokens


@pytest.mark.parametrize("case", ["length", "stop", "top logprobs"])
def test_answers_are_those_of_bare_vllm(stub_vlm: EdgeVLM, case: str) -> None:
    stop = [" stub"] if case == "stop" else None
    options: dict[str, Any] = {"max_tokens": 24, "logprobs": 3 if case == "top logprobs" else 1}
    options["ignore_eos"] = case == "length"
    stream = stub_vlm.stream(None, "x", **options, **({"stop": stop} if stop else {}))
    ours = stream.result()
    prompt = {"prompt_token_ids": list(stream.prompt_token_ids or ())}

    def bare(engine: Any) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, stop=stop, **options)
        return engine.llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]

    theirs = stub_vlm.in_engine_thread(bare)
    assert ours.token_ids == tuple(theirs.token_ids)
    assert ours.text == theirs.text.removeprefix(" ")
    assert ours.finish_reason == theirs.finish_reason
    pairs = zip(theirs.token_ids, theirs.logprobs, strict=True)
    assert ours.logprobs == pytest.approx([e[token].logprob for token, e in pairs], abs=1e-4)
    if case == "top logprobs":
        assert [set(e) for e in ours.top_logprobs or ()] == [set(e) for e in theirs.logprobs]


def test_a_batch_keeps_its_order_and_one_failure_stays_one(
    real_vlm: EdgeVLM,
) -> None:
    requests = [
        Request(None, "a", max_tokens=2),
        Request(b"no image", "b"),
        Request(None, "c", max_tokens=4),
    ]
    results = real_vlm.batch(requests, return_exceptions=True)
    assert [getattr(r, "text", None) for r in results] == ["This is", None, "This is the molmo"]
    assert isinstance(results[1], ImageError)


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
        ("https://example.com/a.jpg", "x", {}, ImageError),
        (None, "x", {"temperature": math.nan}, SamplingError),
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


def test_an_image_is_one_and_cut_as_the_request_says(stub_vlm: EdgeVLM) -> None:
    big = np.zeros((900, 1200, 3), np.uint8)
    wide = big[:300]
    assert stub_vlm.query(wide, "x", max_tokens=1).metrics.image_tokens == 412
    assert stub_vlm.query(wide, "x", max_tokens=1, max_crops=1).metrics.image_tokens == 316
    part = {"type": "image", "image": big}
    content = [part, part, {"type": "text", "text": "x"}]
    with pytest.raises(ImageError, match="single images"):
        stub_vlm.chat([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "no/such/directory"}, ModelError, "no/such/directory"),
        ({"engine_args": {"trust_remote_code": True}}, ConfigError, "no code"),
        ({"engine_args": {"tensor_parallel_size": 2}}, ConfigError, "one device"),
        ({"engine_args": {"max_num_batched_token": 9}}, ConfigError, "max_num_batched_tokens"),
    ],
)
def test_bad_settings_are_refused_by_name(
    cache_dir: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EdgeVLM(cache_dir=cache_dir, **arguments)


def test_rendering_leaves_no_thread_pool_behind(stub_vlm: EdgeVLM) -> None:
    """A second OpenMP pool would halve the engine's speed on a CPU."""
    big = np.zeros((900, 1200, 3), np.uint8)
    stub_vlm.query(big, "x", max_tokens=1)
    counts = []

    def ask() -> None:
        counts.append(psutil.Process().num_threads())
        stub_vlm.query(big, "x", max_tokens=1)
        counts.append(psutil.Process().num_threads())

    in_threads([ask])
    assert counts[1] <= counts[0]


# Structured answers.


class Door(BaseModel):
    open: bool
    colour: Literal["red", "green"]
    handles: int = Field(ge=0, le=9)


def test_a_model_class_comes_back_as_an_instance(real_vlm: EdgeVLM) -> None:
    plain = real_vlm.stream(None, "x")
    for sampling in ({}, {"temperature": 2.0, "seed": 5}):
        result = real_vlm.query(None, "?", json_schema=Door, max_tokens=100, **sampling)
        assert isinstance(result.parsed, Door)
        assert json.loads(result.text) == result.parsed.model_dump()
    assert plain.result().text == TEXT


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["left", "right"]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        {
            "type": "object",
            "properties": {"label": {"type": "string", "maxLength": 8}},
            "required": ["label"],
        },
        {"type": "integer", "minimum": 3, "maximum": 17},
    ],
)
def test_answers_follow_their_schema(stub_vlm: EdgeVLM, schema: dict[str, Any]) -> None:
    result = stub_vlm.query(None, "x", json_schema=schema, max_tokens=100)
    jsonschema.validate(result.parsed, schema)


def test_an_answer_cut_off_keeps_its_text(stub_vlm: EdgeVLM) -> None:
    with pytest.raises(GenerationError, match="max_tokens") as caught:
        stub_vlm.query(None, "x", json_schema=Door, max_tokens=4)
    assert caught.value.partial.startswith("{")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/$defs/missing"},
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "string", "pattern": "^[a-"},
        {"type": "string", "pattern": "^(?=a)b$"},
        {"not": {"type": "integer"}},
        {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_before_the_call(
    real_vlm: EdgeVLM, schema: dict[str, Any]
) -> None:
    with pytest.raises(SamplingError, match="cannot honour"):
        real_vlm.query(None, "x", json_schema=schema)
    assert real_vlm.state == "ready"


def test_pointing_runs_on_the_real_engine(stub_vlm: EdgeVLM, photo: np.ndarray) -> None:
    [result] = stub_vlm.point(photo, ["mug"])
    assert (result.text, result.points) == (TEXT, ())
    count = stub_vlm.count(photo, "mugs")
    assert (count.number, count.how) == (None, "unread")
