"""`EdgeVLM` on vLLM, in the engine's thread and in a process of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import psutil
import pytest
import torch
from pydantic import BaseModel, Field

from molmo_edge import EdgeVLM, Request
from molmo_edge.engine.pending import PendingRequest
from molmo_edge.errors import (
    ConfigError,
    GenerationError,
    ImageError,
    InputError,
    PromptError,
    PromptTooLongError,
    RequestCancelled,
    RequestTimeout,
    SamplingError,
)
from molmo_edge.models.molmo2.synthetic import TEXT
from tests.engine.support import FOREVER, in_threads

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def test_both_engines_give_the_same_complete_answer(
    stub_vlm: EdgeVLM, process_vlm: EdgeVLM, photo: np.ndarray
) -> None:
    content = [{"type": "image", "image": photo}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "Where?"},
    ]
    one, other = results = [vlm.chat(messages, logprobs=2) for vlm in (stub_vlm, process_vlm)]
    for result, engine in zip(results, ("thread", "process"), strict=True):
        assert (result.text, result.finish_reason) == (TEXT, "stop")
        assert result.logprobs is not None and result.top_logprobs is not None
        for token, logprob, top in zip(
            result.token_ids, result.logprobs, result.top_logprobs, strict=True
        ):
            assert top[token] == logprob <= 0
            assert len(top) == 2
        environment = result.environment or {}
        assert (environment["engine"], environment["random_weights"]) == (engine, True)
        assert {"vllm", "torch", "transformers"} <= set(environment)
        metrics = result.metrics
        assert (metrics.image_tokens, metrics.cached_tokens) == (410, 0)
        assert metrics.prompt_tokens is not None and metrics.prompt_tokens > 410
        assert metrics.output_tokens == len(metrics.itl_s) + 1 == len(result.token_ids)
        assert metrics.preprocess_s is not None
        assert metrics.ttft_s is not None and metrics.e2e_s is not None
        assert metrics.preprocess_s < metrics.ttft_s < metrics.e2e_s
        assert metrics.ttft_s + sum(metrics.itl_s) == pytest.approx(metrics.e2e_s)
    assert one.token_ids == other.token_ids
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_parts_of_the_start_add_up(real_vlm: EdgeVLM) -> None:
    seconds = real_vlm.startup
    parts = [seconds[name] for name in ("config", "imports", "engine")]
    assert all(part is not None for part in parts)
    assert seconds["total"] == pytest.approx(sum(parts))  # type: ignore[arg-type]
    assert seconds["compile"] == 0  # the CPU profile is eager


def test_max_tokens_stop_strings_and_the_context_end_an_answer(real_vlm: EdgeVLM) -> None:
    stopped = real_vlm.query(None, "x", stop=" stub")
    assert (stopped.text, stopped.finish_reason) == ("This is the molmo_edge", "stop")
    cut = real_vlm.query(None, "x", max_tokens=3)
    assert (cut.text, cut.finish_reason) == ("This is the", "length")
    full = real_vlm.query(None, "word " * 300, **FOREVER)
    assert full.finish_reason == "length"
    assert full.metrics.prompt_tokens is not None
    assert full.metrics.prompt_tokens + full.metrics.output_tokens == 2048


def test_streams_and_calls_at_once_share_the_engine(real_vlm: EdgeVLM) -> None:
    start = threading.Barrier(9)
    names: set[str] = set()

    def caller(i: int) -> None:
        start.wait()
        stream = real_vlm.stream(None, f"question {i}", max_tokens=3 + i, logprobs=1)
        deltas = list(stream)
        result = stream.result()
        assert "".join(deltas) == result.text
        assert TEXT.startswith(result.text)
        assert len(result.token_ids) == len(result.logprobs or ()) == 3 + i

    def call() -> None:
        start.wait()
        for _ in range(5):
            names.add(real_vlm.in_engine_thread(lambda engine: threading.current_thread().name))

    in_threads([call, *(lambda i=i: caller(i) for i in range(8))])  # type: ignore[misc]
    assert names == {"molmo-edge-engine"}


def test_requests_that_end_early_leave_the_next_answer_right(real_vlm: EdgeVLM) -> None:
    endless = {"ignore_eos": True, "max_tokens": 1500}
    stream = real_vlm.stream(None, "noise", **endless)
    next(stream)
    stream.cancel()
    with pytest.raises(RequestCancelled):
        stream.result()
    with pytest.raises(RequestTimeout):
        real_vlm.query(None, "noise", **endless, timeout=0.3)

    async def cancelled() -> str:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(real_vlm.aquery(None, "noise", **endless), 0.3)
        return (await real_vlm.aquery(None, "x")).text

    assert asyncio.run(cancelled()) == TEXT
    real_vlm.reset_caches()
    assert real_vlm.query(None, "x").text == TEXT


def test_scores_are_those_of_generation(real_vlm: EdgeVLM) -> None:
    result = real_vlm.query(None, "x", max_tokens=5, logprobs=1)
    score = real_vlm.score(None, "x", result.token_ids, candidates=[[0, 1]] * 5)
    assert score.logprobs == pytest.approx(result.logprobs, abs=1e-2)
    assert all(set(c) == {0, 1} for c in score.candidates)
    assert len(score.prompt_token_ids) == result.metrics.prompt_tokens


def test_choices_share_one_prefill_which_other_requests_do_not_read(
    real_vlm: EdgeVLM, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PendingRequest] = []

    def record(self: EdgeVLM, *args: Any) -> PendingRequest:
        made.append(pending(self, *args))
        return made[-1]

    pending = EdgeVLM._pending
    monkeypatch.setattr(EdgeVLM, "_pending", record)
    choices = ["This is", "This was", "That is it"]
    real_vlm.reset_caches()
    first = real_vlm.choose(photo, "Which?", choices)
    assert first.choice == "This is"
    cached = [one.result().metrics.cached_tokens or 0 for one in made]
    assert cached[0] == 0 and min(cached[1:]) > 300 and len(cached) == first.metrics.output_tokens
    single = real_vlm.choose(photo, "What else?", ["This", "N"])
    assert single.metrics.output_tokens == 1 and (single.metrics.cached_tokens or 0) > 300
    for one in (real_vlm.query(photo, "Which?"), real_vlm.query(photo, "Which?")):
        assert (one.text, one.metrics.cached_tokens) == (TEXT, 0)
    requests = [Request.choose(photo, "Which?", choices) for _ in range(3)]
    for choice in real_vlm.batch(requests):
        assert choice.probabilities == pytest.approx(first.probabilities, abs=1e-2)


def test_choices_that_cannot_be_scored_are_refused(stub_vlm: EdgeVLM, photo: np.ndarray) -> None:
    for wrong, error in ((["yes", "<im_patch>"], PromptError), (["a", "b " * 3000], InputError)):
        with pytest.raises(error):
            stub_vlm.choose(photo, "Which?", wrong)
    assert stub_vlm.choose(photo, "Which?", ["N", "This"]).choice == "This"


def test_the_plan_is_that_of_the_engines_settings(stub_vlm: EdgeVLM) -> None:
    plan = stub_vlm.plan()
    assert {row.max_model_len for row in plan.rows} == {stub_vlm.settings.max_model_len}
    assert plan.batch == stub_vlm.settings.max_num_seqs


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


def test_a_batch_keeps_its_order_and_one_failure_stays_one(real_vlm: EdgeVLM) -> None:
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
        (None, "see <im_patch>", {}, PromptError),
        (None, "<|endoftext|>", {}, PromptError),
        (None, "x " * 4000, {}, PromptTooLongError),
        ("https://example.com/a.jpg", "x", {}, ImageError),
        (None, "x", {"max_crops": 99}, SamplingError),
    ],
)
def test_bad_input_is_refused_and_the_next_request_works(
    stub_vlm: EdgeVLM, image: Any, text: str, options: dict[str, Any], error: type[InputError]
) -> None:
    with pytest.raises(error):
        stub_vlm.query(image, text, **options)
    assert stub_vlm.query(None, "x", max_tokens=2).text == "This is"


def test_a_request_sets_its_own_crops_and_its_thread_keeps_no_thread_pool(
    stub_vlm: EdgeVLM,
) -> None:
    """A second OpenMP pool would halve the engine's speed on a CPU."""
    wide = np.zeros((300, 1200, 3), np.uint8)
    options: dict[str, Any] = {"max_tokens": 1, "max_crops": 1}
    assert stub_vlm.query(wide, "x", **options).metrics.image_tokens == 410
    counts = []

    def query() -> None:
        counts.append(psutil.Process().num_threads())
        stub_vlm.query(wide, "x", **options)
        counts.append(psutil.Process().num_threads())

    in_threads([query])
    assert counts[1] <= counts[0]


def test_a_misspelt_engine_argument_is_refused_with_the_right_name(cache_dir: Path) -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        EdgeVLM(cache_dir=cache_dir, engine_args={"max_num_batched_token": 9})


def _with_vision_weights(vlm: EdgeVLM, value: float) -> float:
    """Set a bias of the projection of image features, and return what it was; empty all caches."""

    def change(model: Any) -> float:
        for module in model.modules():
            if isinstance(cache := getattr(module, "kv_cache", None), torch.Tensor):
                cache.zero_()  # what is masked out is multiplied by 0, and NaN stays NaN
        bias = model.vision_backbone.image_pooling_2d.o_proj.bias.data
        before = float(bias[0])
        bias[0] = value
        return before

    def in_engine(engine: Any) -> float:
        engine.reset_caches()
        [before] = engine.llm.apply_model(change)
        return float(before)

    return vlm.in_engine_thread(in_engine)


def test_nan_is_an_error_of_the_requests_it_reaches_alone(
    stub_vlm: EdgeVLM, photo: np.ndarray
) -> None:
    """Not "!!!!", no point, or a JSON object that the grammar made of nothing."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    before = _with_vision_weights(stub_vlm, float("nan"))
    try:
        healthy = stub_vlm.stream(None, "x")
        for verb in (
            lambda: stub_vlm.query(photo, "x"),
            lambda: stub_vlm.query(photo, "x", temperature=1.0, top_p=0.5, seed=1, logprobs=2),
            lambda: stub_vlm.query(photo, "x", json_schema=schema),
            lambda: stub_vlm.point(photo, "cup"),
            lambda: stub_vlm.score(photo, "x", [5, 6]),
            lambda: stub_vlm.warmup(tokens=2, max_rounds=2),
        ):
            with pytest.raises(GenerationError, match=r"computed NaN.*dtype bfloat16"):
                verb()
        assert healthy.result().text == TEXT
    finally:
        _with_vision_weights(stub_vlm, before)
    assert stub_vlm.query(photo, "x").text == TEXT


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
    with pytest.raises(GenerationError, match="max_tokens") as caught:
        real_vlm.query(None, "x", json_schema=Door, max_tokens=4)
    assert caught.value.partial.startswith("{")


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["left", "right"]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        {"type": "integer", "minimum": 3, "maximum": 17},
    ],
)
def test_answers_follow_their_schema(stub_vlm: EdgeVLM, schema: dict[str, Any]) -> None:
    result = stub_vlm.query(None, "x", json_schema=schema, max_tokens=100)
    jsonschema.validate(result.parsed, schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/$defs/missing"},
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "string", "pattern": "^(?=a)b$"},
        {"not": {"type": "integer"}},
        {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_before_the_call(
    stub_vlm: EdgeVLM, schema: dict[str, Any]
) -> None:
    with pytest.raises(SamplingError, match="cannot honour"):
        stub_vlm.query(None, "x", json_schema=schema)
    assert stub_vlm.state == "ready"
