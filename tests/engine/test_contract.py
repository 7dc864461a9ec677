"""The same promises, kept by the fake engine and by the real one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from molmo_edge import EdgeVLM, Request, Result
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import (
    ImageError,
    MolmoEdgeError,
    PromptError,
    PromptTooLongError,
    RequestCancelled,
    RequestTimeout,
    SamplingError,
)
from molmo_edge.models.molmo.stub import TEXT as SENTENCE
from tests.engine.support import FOREVER, eventually

pytestmark = pytest.mark.timeout(600)
LONG: dict[str, Any] = {**FOREVER, "max_tokens": 1500}
IMAGE = np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.engine)])
def vlm(request: pytest.FixtureRequest) -> Iterator[EdgeVLM]:
    """An engine that answers SENTENCE; every test leaves it empty."""
    if request.param == "real":
        one: EdgeVLM = request.getfixturevalue("stub_vlm")
        yield one
        _nothing_is_left(one)
        return
    # As slow as a real step, so that a request can be interrupted.
    fake = FakeEngine.factory(SENTENCE, step_s=0.001, max_model_len=2048)
    with EdgeVLM(engine=fake) as one:
        yield one
        _nothing_is_left(one)


def _nothing_is_left(vlm: EdgeVLM) -> None:
    eventually(lambda: vlm._loop._in_flight == 0)
    assert vlm.state == "ready"
    assert vlm.query(None, "What is this?", timeout=60).text == SENTENCE


def test_an_answer_has_text_tokens_logprobs_and_metrics(vlm: EdgeVLM) -> None:
    result = vlm.query(IMAGE, "What is this?", max_crops=1, logprobs=2)
    assert result.text == SENTENCE
    assert result.finish_reason == "stop"
    metrics = result.metrics
    assert metrics.output_tokens == len(result.token_ids) == len(metrics.itl_s) + 1
    assert metrics.prompt_tokens is not None and metrics.image_tokens is not None
    assert metrics.prompt_tokens > metrics.image_tokens > 0
    assert metrics.e2e_s is not None and metrics.ttft_s is not None
    assert 0 < metrics.ttft_s <= metrics.e2e_s
    assert result.logprobs is not None and result.top_logprobs is not None
    assert len(result.logprobs) == len(result.top_logprobs) == len(result.token_ids)
    assert all(
        top[token] == logprob <= 0
        for token, logprob, top in zip(
            result.token_ids, result.logprobs, result.top_logprobs, strict=True
        )
    )


def test_an_answer_is_the_same_twice_and_in_every_form(vlm: EdgeVLM) -> None:
    result = vlm.query(None, "What is this?")
    assert vlm.query(None, "What is this?").token_ids == result.token_ids
    stream = vlm.stream(None, "What is this?")
    deltas = list(stream)
    assert len(deltas) > 5
    assert "".join(deltas) == result.text
    assert stream.result().token_ids == result.token_ids
    assert vlm.chat([{"role": "user", "content": "What is this?"}]).token_ids == result.token_ids
    assert asyncio.run(vlm.aquery(None, "What is this?")).token_ids == result.token_ids

    async def read() -> str:
        return "".join([delta async for delta in vlm.astream(None, "What is this?")])

    assert asyncio.run(read()) == result.text


def test_max_tokens_stop_strings_and_the_context_end_an_answer(vlm: EdgeVLM) -> None:
    cut = vlm.query(None, "What is this?", max_tokens=3)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 3)
    assert SENTENCE.startswith(cut.text) and cut.text
    stopped = vlm.query(None, "What is this?", stop=[" stub"])
    assert (stopped.text, stopped.finish_reason) == ("This is the molmo_edge", "stop")
    assert "".join(vlm.stream(None, "What is this?", stop=" stub")) == "This is the molmo_edge"
    endless = vlm.query(None, "What is this?", ignore_eos=True, max_tokens=40)
    assert (endless.finish_reason, len(endless.token_ids)) == ("length", 40)
    result = vlm.query(None, "word " * 300, **FOREVER)
    assert result.finish_reason == "length"
    assert result.metrics.prompt_tokens is not None
    assert result.metrics.prompt_tokens + result.metrics.output_tokens == 2048


def test_bad_input_is_refused_and_the_next_request_is_right(vlm: EdgeVLM) -> None:
    cases: list[tuple[Callable[[], object], type[MolmoEdgeError]]] = [
        (lambda: vlm.query(None, ""), PromptError),
        (lambda: vlm.query(None, "look <im_patch> here"), PromptError),
        (lambda: vlm.query(None, "<|endoftext|>"), PromptError),
        (lambda: vlm.query(None, "word " * 20_000), PromptTooLongError),
        (lambda: vlm.query(b"nothing", "q"), ImageError),
        (lambda: vlm.query(None, "q", top_p=0), SamplingError),
        (lambda: vlm.query(None, "q", json_schema={"type": "nonsense"}), MolmoEdgeError),
    ]
    for bad, kind in cases:
        if kind is MolmoEdgeError and vlm.environment["model"] == "fake":
            continue  # its answers are scripted, whatever the schema
        with pytest.raises(kind):
            bad()
        assert vlm.query(None, "What is this?").text == SENTENCE


def test_a_failure_in_rendering_does_not_disturb_other_requests(vlm: EdgeVLM) -> None:
    requests = [
        Request(None, "What is this?"),
        Request(b"\x89PNG broken", "What is this?"),
        Request(None, "special <im_start>"),
        Request(IMAGE, "What is this?", max_crops=1),
        Request(None, "What is this?", max_tokens=-1),
        Request(None, "What is this?"),
    ]
    results = vlm.batch(requests, return_exceptions=True)
    kinds = [Result, ImageError, PromptError, Result, SamplingError, Result]
    assert [type(result) for result in results] == kinds
    assert {result.text for result in results if isinstance(result, Result)} == {SENTENCE}


def test_cancelling_in_the_middle_leaves_the_next_answer_right(vlm: EdgeVLM) -> None:
    stream = vlm.stream(None, "What is this?", **LONG)
    for _ in range(5):
        next(stream)
    stream.cancel()
    with pytest.raises(RequestCancelled):
        stream.result()
    assert vlm.query(None, "What is this?").text == SENTENCE
    for _ in vlm.stream(None, "What is this?", **LONG):
        break
    assert vlm.query(None, "What is this?").text == SENTENCE


def test_a_cancelled_task_frees_its_sequence(vlm: EdgeVLM) -> None:
    async def go() -> None:
        stream = await vlm.astream(None, "What is this?", **LONG)
        await anext(stream)
        task = asyncio.create_task(stream.aresult())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await vlm.aquery(None, "What is this?")).text == SENTENCE

    asyncio.run(go())


def test_many_threads_at_once(vlm: EdgeVLM) -> None:
    with ThreadPoolExecutor(16) as pool:
        texts = list(
            pool.map(lambda _: vlm.query(None, "What is this?", timeout=120).text, range(48))
        )
    assert texts == [SENTENCE] * 48


def test_a_deadline_ends_running_and_queued_requests(vlm: EdgeVLM) -> None:
    with pytest.raises(RequestTimeout) as caught:
        vlm.query(None, "What is this?", timeout=0.5, **LONG)
    assert caught.value.partial.startswith("This is the")
    streams = [vlm.stream(None, "What is this?", **LONG) for _ in range(8)]
    late = [vlm.stream(None, "What is this?", timeout=0.3, **LONG) for _ in range(8)]
    for stream in late:
        with pytest.raises(RequestTimeout):
            stream.result()
    for stream in streams:
        stream.cancel()


def test_calls_run_between_the_steps_of_a_request(vlm: EdgeVLM) -> None:
    stream = vlm.stream(None, "What is this?")
    threads: set[str] = set()
    for _ in range(5):
        threads.add(vlm.in_engine_thread(lambda engine: threading.current_thread().name))
    assert threads == {"molmo-edge-engine"}
    assert stream.result().text == SENTENCE


def test_scores_are_those_of_the_answer(vlm: EdgeVLM) -> None:
    result = vlm.query(None, "What is this?", logprobs=1, max_tokens=4)
    score = vlm.score(None, "What is this?", result.token_ids)
    assert score.token_ids == result.token_ids
    assert result.logprobs is not None
    assert score.logprobs == pytest.approx(result.logprobs, abs=0.1)
