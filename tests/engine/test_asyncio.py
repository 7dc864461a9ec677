"""asyncio: the same promises, no thread per request, and cancellation at every await."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from molmo_edge import EdgeVLM, Request
from molmo_edge.engine.fake import FakeEngine, FakeFactory, Fault
from molmo_edge.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    ImageError,
    PromptError,
    QueueFull,
    RequestTimeout,
)
from tests.engine.support import FOREVER, WORDS, assert_all_ended, echo, eventually, opened

pytestmark = pytest.mark.timeout(90)


def run(fake: FakeFactory, body: Callable[[EdgeVLM], Awaitable[None]], **settings: Any) -> None:
    """Run `body(vlm)` to its end; then every request must have ended once."""
    with opened(fake, **settings) as vlm:
        asyncio.run(body(vlm))  # type: ignore[arg-type]
        assert_all_ended(vlm, fake)


def test_query_stream_and_batch() -> None:
    async def body(vlm: EdgeVLM) -> None:
        assert (await vlm.aquery(None, "a")).text == f"a {WORDS}"
        assert "".join([d async for d in vlm.astream(None, "b")]) == f"b {WORDS}"
        assert (await (await vlm.astream(None, "c")).aresult()).text == f"c {WORDS}"
        results = await vlm.abatch([Request(None, f"q{i}") for i in range(40)])
        assert [str(r) for r in results] == [f"q{i} {WORDS}" for i in range(40)]
        queries = [vlm.aquery(None, f"q{i}", timeout=80) for i in range(40)]
        assert [str(r) for r in await asyncio.gather(*queries)] == [str(r) for r in results]
        requests = [Request(None, "a"), Request(None, ""), Request(None, "c")]
        results = await vlm.abatch(requests, return_exceptions=True)
        assert [str(results[0]), str(results[2])] == [f"a {WORDS}", f"c {WORDS}"]
        assert isinstance(results[1], PromptError)
        with pytest.raises(PromptError):
            await vlm.abatch(requests)
        async with aclosing(vlm.aiter_batch([Request(None, "q", **FOREVER), *requests])) as answers:
            assert {(await anext(answers))[0] for _ in range(3)} == {1, 2, 3}

    run(FakeEngine.factory(echo), body, max_queue=5)


def test_a_batch_is_taken_as_there_is_room_and_ends_when_its_iterable_fails() -> None:
    async def body(vlm: EdgeVLM) -> None:
        endless = (Request(None, f"q{next(taken)}") for _ in itertools.repeat(0))
        async with aclosing(vlm.aiter_batch(endless)) as answers:
            assert len({(await anext(answers))[0] for _ in range(3)}) == 3
        assert next(taken) <= 4 + 3
        failing = (Request(None, "q", **FOREVER) if n < 3 else 1 / 0 for n in itertools.count())
        with pytest.raises(ZeroDivisionError):
            await vlm.abatch(failing)  # type: ignore[arg-type]

        async def refused() -> AsyncIterator[Request]:
            yield Request(None, "q", **FOREVER)
            raise ImageError("the iterable's own")

        with pytest.raises(ImageError, match="the iterable's own"):
            await vlm.abatch(refused(), return_exceptions=True)

    taken = itertools.count()
    run(FakeEngine.factory(echo), body, max_num_seqs=2)


def test_an_iterable_may_block_or_be_an_async_one() -> None:
    """The event loop releases the generator: blocked, it never would."""
    release = threading.Event()

    def blocking() -> Iterator[Request]:
        yield Request(None, "a")
        release.wait()
        yield Request(None, "b")

    async def asynchronous() -> AsyncIterator[Request]:
        for text in "ab":
            await asyncio.sleep(0)
            yield Request(None, text)

    async def body(vlm: EdgeVLM) -> None:
        async with aclosing(vlm.aiter_batch(blocking())) as answers:
            assert [(await anext(answers))[0]] == [0]  # while the second is awaited
            release.set()
            assert [(index, str(one)) async for index, one in answers] == [(1, f"b {WORDS}")]
        assert [str(one) for one in await vlm.abatch(asynchronous())] == [
            f"{text} {WORDS}" for text in "ab"
        ]

    run(FakeEngine.factory(echo), body)


@pytest.mark.parametrize("form", ["iter_batch", "aiter_batch"])
def test_a_long_batch_keeps_no_images(form: str) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 2 * 4 + 2  # in flight, being prepared, and being yielded

    def requests() -> Iterator[Request]:
        for _ in range(1000):
            image = np.zeros((8, 8, 3), np.uint8)
            alive[:] = [one for one in alive if one() is not None] + [weakref.ref(image)]
            assert len(alive) <= most
            yield Request(image, "q", max_tokens=2)

    async def body(vlm: EdgeVLM) -> None:
        assert len([index async for index, _ in vlm.aiter_batch(requests())]) == 1000

    fake = FakeEngine.factory(echo)
    if form == "aiter_batch":
        run(fake, body, max_num_seqs=4)
    else:
        with opened(fake, max_num_seqs=4) as vlm:
            assert len(list(vlm.iter_batch(requests()))) == 1000


def test_tasks_that_share_a_stream_share_one_request() -> None:
    fake = FakeEngine.factory(echo, step_s=0.03)

    async def body(vlm: EdgeVLM) -> None:
        stream = vlm.astream(None, "q")

        async def read() -> int:
            return len([delta async for delta in stream])

        assert sum(await asyncio.gather(*(read() for _ in range(5)))) > 5
        assert (await (await stream).aresult()).text == f"q {WORDS}"
        assert len(fake.engine.added) == 1

    run(fake, body)


def test_the_event_loop_is_never_blocked() -> None:
    """The event loop releases rendering and the engine: blocked, it never would."""
    holds = {"render": threading.Event(), "step": threading.Event()}
    fake = FakeEngine.factory(echo, holds=holds)

    async def body(vlm: EdgeVLM) -> None:
        tasks = [asyncio.create_task(vlm.aquery(None, "q", timeout=60)) for _ in range(4)]
        for call, hold in holds.items():
            while not fake.calls[call]:
                await asyncio.sleep(0.001)
            hold.set()
        await asyncio.gather(*tasks)

    run(fake, body)


@pytest.mark.parametrize("kind", ["query", "stream", "batch", "watch"])
def test_a_task_cancelled_at_any_await_leaves_nothing(kind: str) -> None:
    """Cancel after 0, 1, 2 … turns of the event loop, from before rendering to the end."""

    async def work(vlm: EdgeVLM) -> None:
        if kind == "query":
            await vlm.aquery(None, "q")
        elif kind == "stream":
            async for _ in vlm.astream(None, "q"):
                pass
        elif kind == "watch":
            async for _ in vlm.awatch([np.zeros((8, 8, 3), np.uint8)] * 9, "q"):
                pass
        else:
            await vlm.abatch([Request(None, "q"), Request(None, "r")])

    async def body(vlm: EdgeVLM) -> None:
        cancelled = 0
        for turns in range(60):
            task = asyncio.create_task(work(vlm))
            for _ in range(turns):
                await asyncio.sleep(0)
            if not task.done():
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                cancelled += 1
        assert cancelled > 3

    run(FakeEngine.factory(echo, step_s=0.0005), body)


@pytest.mark.parametrize("where", ["render", "step", "room"])
def test_a_deadline_covers_the_whole_request(where: str) -> None:
    hold = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step" if where == "room" else where: hold})

    async def body(vlm: EdgeVLM) -> None:
        first = vlm.stream(None, "first") if where == "room" else None
        with pytest.raises(RequestTimeout):
            await vlm.aquery(None, "q", timeout=0.05, **FOREVER)
        if first is not None:
            with pytest.raises(QueueFull):
                await vlm.aquery(None, "q")
        hold.set()
        if first is not None:
            assert (await first.aresult()).text == f"first {WORDS}"

    run(fake, body, max_queue=1)


def test_a_timeout_of_the_callers_and_leaving_the_loop_free_the_sequence() -> None:
    fake = FakeEngine.factory(echo, step_s=0.001)

    async def body(vlm: EdgeVLM) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(vlm.aquery(None, "q", **FOREVER), 0.5)
        async for _ in vlm.astream(None, "q", **FOREVER):
            break
        async with await vlm.astream(None, "q", **FOREVER) as stream:
            await anext(stream)
        await anext(vlm.astream(None, "q", **FOREVER))
        gc.collect()

    run(fake, body)
    assert len(fake.engine.aborted) == 4


@pytest.mark.parametrize("where", ["render", "step"])
def test_an_event_loop_closed_during_a_request_does_not_disturb_the_engine(where: str) -> None:
    hold = threading.Event()
    fake = FakeEngine.factory(echo, holds={where: hold})
    with opened(fake) as vlm:
        loop = asyncio.new_event_loop()
        coroutine = vlm.aquery(None, "q")
        task = loop.create_task(coroutine)
        while not fake.calls[where]:
            loop.run_until_complete(asyncio.sleep(0.001))
        loop.close()
        hold.set()
        assert vlm.query(None, "a").text == f"a {WORDS}"
        loop.set_exception_handler(lambda *_: None)
        coroutine.close()
        del task, coroutine
        gc.collect()
        assert_all_ended(vlm, fake)


@pytest.mark.parametrize("end", ["dies", "closes"])
def test_the_engines_end_wakes_every_task(end: str) -> None:
    faults = [Fault("step", RuntimeError("broken"), 5)] if end == "dies" else []
    fake = FakeEngine.factory(echo, faults=faults, step_s=0.001)
    with opened(fake, max_queue=4) as vlm:

        async def crowd() -> list[Any]:
            tasks = [
                asyncio.create_task(vlm.aquery(None, "q", timeout=60, **FOREVER)) for _ in range(20)
            ]
            await asyncio.to_thread(fake.wait_for, "step", 4)
            if end == "closes":
                await asyncio.to_thread(vlm.close)
            return await asyncio.gather(*tasks, return_exceptions=True)

        kind = EngineDeadError if end == "dies" else EngineClosedError
        assert {type(one) for one in asyncio.run(crowd())} == {kind}
        with pytest.raises(kind):
            asyncio.run(vlm.aquery(None, "late"))


def test_the_engines_own_thread_is_refused_even_when_the_queue_is_full() -> None:
    with opened(FakeEngine.factory(echo, step_s=0.001), max_queue=1) as vlm:
        stream = vlm.stream(None, "q", **FOREVER)
        with pytest.raises(EngineError, match="own thread"):
            vlm.in_engine_thread(lambda _: asyncio.run(vlm.aquery(None, "q", timeout=60)))
        stream.cancel()
        eventually(lambda: stream.done)
