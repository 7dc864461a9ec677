"""asyncio: the same promises, no thread per request, and cancelling at every await."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from typing import Any

import pytest

from molmo_edge import EdgeVLM, MolmoEdgeError, Request
from molmo_edge.engine.fake import FakeEngine, FakeFactory, Fault
from molmo_edge.errors import (
    EngineClosedError,
    EngineDeadError,
    PromptError,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
)
from tests.engine.support import (
    FOREVER,
    WORDS,
    assert_each_ended_once,
    echo,
    eventually,
    opened,
)

pytestmark = pytest.mark.timeout(60)


def run(fake: FakeFactory, body: Any, **settings: Any) -> None:
    """Runs `body(vlm)` to its end, then looks whether every request ended once."""
    with opened(fake, **settings) as vlm:
        asyncio.run(body(vlm))
        eventually(lambda: not fake.engine.running)
        eventually(lambda: vlm._loop._in_flight == 0)
        assert vlm.query(None, "after").text == f"after {WORDS}"
    for engine in fake.engines:
        assert_each_ended_once(engine)


def test_query_stream_and_batch() -> None:
    async def body(vlm: EdgeVLM) -> None:
        assert (await vlm.aquery(None, "a")).text == f"a {WORDS}"
        assert "".join([d async for d in vlm.astream(None, "b")]) == f"b {WORDS}"
        stream = await vlm.astream(None, "c")
        assert (await stream.aresult()).text == f"c {WORDS}"
        results = await vlm.abatch([Request(None, f"q{i}") for i in range(40)])
        assert [str(r) for r in results] == [f"q{i} {WORDS}" for i in range(40)]

    run(FakeEngine.factory(echo), body, max_queue=5)


def test_a_thousand_requests_share_a_few_threads() -> None:
    most = 0

    async def body(vlm: EdgeVLM) -> None:
        async def one(i: int) -> None:
            nonlocal most
            assert (await vlm.aquery(None, f"q{i}", timeout=50)).text == f"q{i} {WORDS}"
            most = max(most, threading.active_count())

        await asyncio.gather(*map(one, range(1000)))

    before = threading.active_count()
    run(FakeEngine.factory(echo), body)
    # Engine, watchdog, and asyncio's own pool.
    assert most - before <= 2 + min(32, (os.cpu_count() or 1) + 4)


def test_the_event_loop_is_never_blocked() -> None:
    """The event loop itself lets rendering and the engine go on: blocked, it never would."""
    holds = {"render": threading.Event(), "step": threading.Event()}
    fake = FakeEngine.factory(echo, holds=holds)

    async def body(vlm: EdgeVLM) -> None:
        asks = [asyncio.create_task(vlm.aquery(None, "q", timeout=20)) for _ in range(4)]
        for call, hold in holds.items():
            while not fake.calls[call]:
                await asyncio.sleep(0.001)
            hold.set()
        await asyncio.gather(*asks)

    run(fake, body)


def test_one_bad_item_of_a_batch_is_its_own_failure() -> None:
    async def body(vlm: EdgeVLM) -> None:
        requests = [Request(None, "a"), Request(None, ""), Request(None, "c")]
        results = await vlm.abatch(requests, return_exceptions=True)
        assert [str(results[0]), str(results[2])] == [f"a {WORDS}", f"c {WORDS}"]
        assert isinstance(results[1], PromptError)
        with pytest.raises(PromptError):
            await vlm.abatch(requests)

    run(FakeEngine.factory(echo), body)


def test_a_task_cancelled_after_any_number_of_turns_leaves_nothing() -> None:
    """Walks the cancellation through every await there is, from before rendering to the end."""

    async def ask(vlm: EdgeVLM, kind: int) -> None:
        if kind == 0:
            await vlm.aquery(None, "q")
        elif kind == 1:
            async for _ in vlm.astream(None, "q"):
                pass
        else:
            await vlm.abatch([Request(None, "q"), Request(None, "r")])

    async def body(vlm: EdgeVLM) -> None:
        for kind in range(3):
            cancelled = 0
            for turns in range(60):
                task = asyncio.create_task(ask(vlm, kind))
                for _ in range(turns):
                    await asyncio.sleep(0)
                if task.done():
                    task.result()
                    continue
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                cancelled += 1
            assert cancelled > 3

    run(FakeEngine.factory(echo, step_s=0.0005), body)


@pytest.mark.parametrize("where", ["render", "step"])
def test_a_task_cancelled_while_rendering_or_decoding(where: str) -> None:
    hold = threading.Event()
    fake = FakeEngine.factory(echo, holds={where: hold})

    async def body(vlm: EdgeVLM) -> None:
        task = asyncio.create_task(vlm.aquery(None, "q", **FOREVER))
        await asyncio.to_thread(fake.wait_for, where)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hold.set()

    run(fake, body)
    assert len(fake.engine.aborted) == (1 if where == "step" else 0)


def test_a_task_cancelled_while_it_waits_for_room() -> None:
    step = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step": step})

    async def body(vlm: EdgeVLM) -> None:
        first = vlm.stream(None, "first")
        task = asyncio.create_task(vlm.aquery(None, "q", timeout=20))
        await asyncio.to_thread(eventually, lambda: vlm._loop._has_room._wakes)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not vlm._loop._has_room._wakes
        with pytest.raises(QueueFull):
            await vlm.aquery(None, "q")
        step.set()
        assert (await first.aresult()).text == f"first {WORDS}"

    run(fake, body, max_queue=1)
    assert len(fake.engine.added) == 2


@pytest.mark.parametrize("where", ["render", "step", "room"])
def test_a_deadline_covers_rendering_queue_and_decoding(where: str) -> None:
    hold = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step" if where == "room" else where: hold})

    async def body(vlm: EdgeVLM) -> None:
        other = vlm.stream(None, "other") if where == "room" else None
        began = time.monotonic()
        with pytest.raises(RequestTimeout):
            await vlm.aquery(None, "q", timeout=0.05)
        assert time.monotonic() - began < 5
        hold.set()
        if other is not None:
            await other.aresult()

    run(fake, body, max_queue=1)


def test_what_was_generated_until_the_deadline_is_in_the_error() -> None:
    async def body(vlm: EdgeVLM) -> None:
        with pytest.raises(RequestTimeout) as caught:
            await vlm.aquery(None, "q", timeout=1, **FOREVER)
        assert caught.value.partial.startswith("q one two")

    run(FakeEngine.factory(echo, step_s=0.001), body)


def test_somebody_elses_time_out_cancels_as_well() -> None:
    async def body(vlm: EdgeVLM) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await vlm.aquery(None, "q", **FOREVER)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(vlm.aquery(None, "q", **FOREVER), 0.5)

    fake = FakeEngine.factory(echo, step_s=0.001)
    run(fake, body)
    assert len(fake.engine.aborted) == 2


@pytest.mark.parametrize("way", ["break", "drop", "aclose", "error", "context"])
def test_who_leaves_early_frees_the_sequence(way: str) -> None:
    fake = FakeEngine.factory(echo, step_s=0.001)

    async def body(vlm: EdgeVLM) -> None:
        if way == "break":
            async for _ in vlm.astream(None, "q", **FOREVER):
                break
        elif way == "drop":
            await anext(vlm.astream(None, "q", **FOREVER))
        elif way == "aclose":
            stream = await vlm.astream(None, "q", **FOREVER)
            await anext(stream)
            stream.cancel()
            with pytest.raises(RequestCancelled):
                await stream.aresult()
        elif way == "error":
            with pytest.raises(ZeroDivisionError):
                async for _ in vlm.astream(None, "q", **FOREVER):
                    raise ZeroDivisionError
        else:
            async with await vlm.astream(None, "q", **FOREVER) as opened_stream:
                await anext(opened_stream)
        gc.collect()
        while not fake.engine.aborted:
            await asyncio.sleep(0.001)

    run(fake, body)
    assert len(fake.engine.aborted) == 1


def test_an_event_loop_may_end_while_its_requests_run() -> None:
    fake = FakeEngine.factory(echo, step_s=0.001)
    with opened(fake) as vlm:
        streams = []

        async def leave() -> None:
            streams.append(await vlm.astream(None, "q"))
            await anext(streams[0])

        asyncio.run(leave())
        assert asyncio.run(streams[0].aresult()).text == f"q {WORDS}"
        loop = asyncio.new_event_loop()
        task = loop.create_task(vlm.aquery(None, "q", **FOREVER))

        async def until_taken() -> None:
            while len(fake.engine.added) < 2:
                await asyncio.sleep(0.001)

        loop.run_until_complete(until_taken())
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()
        eventually(lambda: len(fake.engine.aborted) == 1)
    assert_each_ended_once(fake.engine)


def test_a_loop_closed_while_a_request_is_rendered_is_no_matter() -> None:
    render = threading.Event()
    fake = FakeEngine.factory(echo, holds={"render": render})
    with opened(fake) as vlm:
        loop = asyncio.new_event_loop()
        coroutine = vlm.aquery(None, "q")
        task = loop.create_task(coroutine)
        loop.run_until_complete(asyncio.sleep(0))
        fake.wait_for("render")
        loop.close()
        render.set()
        assert vlm.query(None, "a").text == f"a {WORDS}"
        loop.set_exception_handler(lambda *_: None)
        coroutine.close()
        del task, coroutine
        gc.collect()
    assert len(fake.engine.added) == 1


def test_death_and_closing_wake_every_task() -> None:
    fake = FakeEngine.factory(echo, faults=[Fault("step", RuntimeError("broken"), 5)])
    with opened(fake, max_queue=4) as vlm:

        async def crowd() -> list[object]:
            asks = (vlm.aquery(None, f"q{i}", timeout=20) for i in range(20))
            return list(await asyncio.gather(*asks, return_exceptions=True))

        ends = asyncio.run(crowd())
        assert {type(end) for end in ends} == {EngineDeadError}
        assert all(isinstance(end.__cause__, RuntimeError) for end in ends)  # type: ignore[attr-defined]

    fake = FakeEngine.factory(echo, step_s=0.001)
    with opened(fake, max_queue=4) as vlm:

        async def close_meanwhile() -> list[object]:
            asks = [
                asyncio.create_task(vlm.aquery(None, "q", timeout=20, **FOREVER)) for _ in range(20)
            ]
            await asyncio.sleep(0.05)
            await asyncio.to_thread(vlm.close)
            return list(await asyncio.gather(*asks, return_exceptions=True))

        assert {type(end) for end in asyncio.run(close_meanwhile())} == {EngineClosedError}
        with pytest.raises(EngineClosedError):
            asyncio.run(vlm.aquery(None, "late"))


def test_a_burst_that_is_still_being_rendered_when_the_engine_closes() -> None:
    render = threading.Event()
    fake = FakeEngine.factory(echo, holds={"render": render})
    vlm = EdgeVLM(engine=fake)

    async def body() -> list[object]:
        asks = [asyncio.create_task(vlm.aquery(None, f"q{i}")) for i in range(20)]
        await asyncio.to_thread(fake.wait_for, "render", 4)
        assert vlm.close(timeout=0.05)
        render.set()
        return list(await asyncio.gather(*asks, return_exceptions=True))

    assert {type(end) for end in asyncio.run(body())} == {EngineClosedError}
    assert vlm.close()
    assert fake.calls["render"] < 20


def test_many_tasks_with_random_ends() -> None:
    async def body(vlm: EdgeVLM) -> None:
        async def one(i: int) -> None:
            try:
                if i % 4 == 0:
                    async for _ in vlm.astream(None, f"q{i}", timeout=30):
                        break
                elif i % 4 == 1:
                    await asyncio.wait_for(vlm.aquery(None, f"q{i}", timeout=30), 0.01)
                elif i % 4 == 2:
                    await vlm.aquery(None, f"q{i}", timeout=0.01)
                else:
                    assert (await vlm.aquery(None, f"q{i}", timeout=30)).text == f"q{i} {WORDS}"
            except (TimeoutError, MolmoEdgeError) as exc:
                assert isinstance(exc, TimeoutError)

        await asyncio.gather(*map(one, range(400)))

    run(FakeEngine.factory(echo, step_s=0.0005), body, max_queue=16)
