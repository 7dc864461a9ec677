"""The same promises, kept by the fake engine and by the real one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import RequestTimeout
from molmo_edge.models.molmo.synthetic import TEXT
from tests.engine.support import FOREVER, eventually, in_threads

pytestmark = pytest.mark.timeout(600)
LONG: dict[str, Any] = {**FOREVER, "max_tokens": 1500}


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.engine)])
def vlm(request: pytest.FixtureRequest) -> Iterator[EdgeVLM]:
    """An engine that answers TEXT; every test leaves it empty and working."""
    if request.param == "real":
        vlm: EdgeVLM = request.getfixturevalue("stub_vlm")
        yield vlm
        _check_empty(vlm)
        return
    # As slow as a real step, so that a request can be interrupted.
    with EdgeVLM(engine=FakeEngine.factory(TEXT, step_s=0.001, max_model_len=2048)) as vlm:
        yield vlm
        _check_empty(vlm)


def _check_empty(vlm: EdgeVLM) -> None:
    eventually(lambda: vlm._loop._in_flight == 0)
    assert vlm.state == "ready"
    assert vlm.query(None, "What is this?", timeout=60).text == TEXT


def test_an_answer_is_the_same_in_every_form(vlm: EdgeVLM) -> None:
    result = vlm.query(None, "What is this?")
    assert (result.text, result.finish_reason) == (TEXT, "stop")
    stream = vlm.stream(None, "What is this?")
    assert "".join(stream) == TEXT

    async def read() -> str:
        return "".join([delta async for delta in vlm.astream(None, "What is this?")])

    assert asyncio.run(read()) == TEXT
    for other in (
        stream.result(),
        vlm.chat([{"role": "user", "content": "What is this?"}]),
        asyncio.run(vlm.aquery(None, "What is this?")),
    ):
        assert other.token_ids == result.token_ids


def test_the_context_ends_an_answer(vlm: EdgeVLM) -> None:
    result = vlm.query(None, "word " * 300, **FOREVER)
    assert result.finish_reason == "length"
    assert result.metrics.prompt_tokens is not None
    assert result.metrics.prompt_tokens + result.metrics.output_tokens == 2048


def test_a_cancelled_task_frees_its_sequence(vlm: EdgeVLM) -> None:
    async def go() -> None:
        stream = await vlm.astream(None, "What is this?", **LONG)
        await anext(stream)
        task = asyncio.create_task(stream.aresult())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await vlm.aquery(None, "What is this?")).text == TEXT

    asyncio.run(go())


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


def test_threads_and_calls_share_the_engine(vlm: EdgeVLM) -> None:
    texts: list[str] = []
    threads: set[str] = set()

    def query() -> None:
        texts.extend(vlm.query(None, "What is this?", timeout=120).text for _ in range(3))

    def call() -> None:
        for _ in range(5):
            threads.add(vlm.in_engine_thread(lambda engine: threading.current_thread().name))

    in_threads([query] * 12 + [call])
    assert texts == [TEXT] * 36 and threads == {"molmo-edge-engine"}
