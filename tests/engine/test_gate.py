"""Waiting and waking, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from molmo_edge.engine.gate import Answer, Gate

from tests.engine.support import eventually, in_threads

pytestmark = pytest.mark.timeout(30)


def test_a_thing_that_is_ready_is_not_waited_for() -> None:
    assert Gate().wait_for(lambda: True, 0.0)


def test_a_wait_ends_at_its_time_out_however_often_it_is_woken() -> None:
    gate = Gate()
    over = threading.Event()

    def wake() -> None:
        while not over.is_set():
            with gate.lock:
                gate.wake()

    thread = threading.Thread(target=wake)
    thread.start()
    began = time.monotonic()
    assert not gate.wait_for(lambda: False, 0.05)
    over.set()
    thread.join()
    assert 0.05 <= time.monotonic() - began < 5


def test_a_time_out_longer_than_the_platform_can_wait_is_no_error() -> None:
    gate = Gate()
    seen: list[bool] = []

    def wait() -> None:
        seen.append(gate.wait_for(lambda: bool(seen), 1e300))

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: gate.waiting)
    with gate.lock:
        seen.append(True)
        gate.wake()
    thread.join()
    assert seen == [True, True]


def test_small_changes_wake_only_those_who_asked_for_them() -> None:
    gate, woken = Gate(), []
    with gate.lock:
        gate._for_small = {lambda: woken.append("all"): True}
        gate._for_big = {lambda: woken.append("end"): True}
        gate.wake(big=False)
        assert woken == ["all"]
        gate.wake()
    assert woken == ["all", "end"]


def test_no_wake_up_is_lost_between_many_threads_and_tasks() -> None:
    gate, count = Gate(), 0

    def reach(number: int) -> None:
        assert gate.wait_for(lambda: count >= number, 20.0)

    async def reach_all() -> None:
        waits = [gate.async_wait_for(lambda n=n: count >= n, 20.0) for n in range(1, 101)]  # type: ignore[misc]
        assert all(await asyncio.gather(*waits))

    def step() -> None:
        nonlocal count
        for _ in range(100):
            with gate.lock:
                count += 1
                gate.wake()

    waiters = [lambda n=n: reach(n) for n in range(1, 101, 5)]
    in_threads([*waiters, lambda: asyncio.run(reach_all()), step])
    assert not gate.waiting


def test_an_interrupted_wait_leaves_nothing_behind() -> None:
    gate = Gate()

    async def go() -> None:
        task = asyncio.create_task(gate.async_wait_for(lambda: False))
        await asyncio.sleep(0)
        assert gate.waiting
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert not gate.waiting


def test_a_closed_event_loop_is_not_woken() -> None:
    gate = Gate()
    loop = asyncio.new_event_loop()
    task = loop.create_task(gate.async_wait_for(lambda: False))
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()
    loop.close()
    with gate.lock:
        gate.wake()
    # asyncio says what it thinks of a task that its loop never let end.
    loop.set_exception_handler(lambda *_: None)
    del task
    gc.collect()


def test_a_finalizer_may_change_what_its_thread_is_busy_changing() -> None:
    gate, woken = Gate(), []

    def finalizer() -> None:
        with gate.lock:
            gate.wake()
        woken.append(1)

    with gate.lock:
        gate._for_small = {finalizer: True, lambda: woken.append(2): True}
        gate.wake()
    assert sorted(woken) == [1, 2]


def test_an_answer_brings_the_value_or_the_exception() -> None:
    good: Answer[int] = Answer()
    good.run(lambda x: x + 1, 1)
    assert good.get() == 2
    bad: Answer[int] = Answer()
    bad.run(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        bad.get()
