"""Closing: in every state, twice, from everywhere; and starting that fails."""

from __future__ import annotations

import threading
import time

import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, Fault
from molmo_edge.engine.loop import EngineLoop
from molmo_edge.errors import (
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
)
from tests.engine.support import (
    WORDS,
    assert_each_ended_once,
    echo,
    eventually,
    in_threads,
    opened,
)

pytestmark = pytest.mark.timeout(60)


def test_a_loop_never_started_closes_at_once_and_stays_closed() -> None:
    fake = FakeEngine.factory()
    loop = EngineLoop(fake)
    assert loop.state == "new"
    assert loop.close() and loop.close()
    assert loop.state == "closed"
    with pytest.raises(EngineClosedError):
        loop.start()
    assert fake.engines == []


def test_closing_while_starting_ends_the_start_and_frees_what_it_built() -> None:
    build = threading.Event()
    fake = FakeEngine.factory(holds={"build": build})
    loop = EngineLoop(fake)
    errors: list[BaseException] = []

    def start() -> None:
        try:
            loop.start()
        except EngineClosedError as exc:
            errors.append(exc)

    thread = threading.Thread(target=start)
    thread.start()
    fake.wait_for("build")
    assert loop.state == "starting"
    assert not loop.close(timeout=0.01)
    # Whoever waits for the start hears of it before the building ends.
    thread.join()
    assert len(errors) == 1
    build.set()
    assert loop.close()
    assert loop.state == "closed" and fake.engine.closed


def test_a_failed_start_while_closing_is_a_close() -> None:
    build = threading.Event()
    fake = FakeEngine.factory(holds={"build": build}, faults=[Fault("build", OSError())])
    loop = EngineLoop(fake)

    def start() -> None:
        with pytest.raises(EngineClosedError):
            loop.start()

    thread = threading.Thread(target=start)
    thread.start()
    fake.wait_for("build")
    loop.close(timeout=0)
    build.set()
    thread.join()
    assert loop.close() and loop.state == "closed"


def test_a_start_that_fails_reaches_the_caller_of_the_constructor() -> None:
    for error, kind in [
        (RuntimeError("boom"), EngineStartError),
        (ConfigError("wrong"), ConfigError),
        (SystemExit(3), EngineStartError),
    ]:
        fake = FakeEngine.factory(faults=[Fault("build", error)])
        with pytest.raises(kind) as caught:
            EdgeVLM(engine=fake)
        assert error in (caught.value, caught.value.__cause__)


def test_closing_an_idle_engine_twice_and_from_many_threads() -> None:
    fake = FakeEngine.factory()
    vlm = EdgeVLM(engine=fake)
    assert vlm.state == "ready"
    in_threads([vlm.close] * 8)
    assert vlm.close() and vlm.state == "closed"
    assert fake.calls["close"] == 1


def test_closing_a_busy_engine_ends_its_requests() -> None:
    fake = FakeEngine.factory(step_s=0.001)
    with opened(fake) as vlm:
        streams = [
            vlm.stream(None, "q", ignore_eos=True, max_tokens=10**6) for _ in range(10)
        ]
        next(streams[0])
        vlm.close()
        for stream in streams:
            with pytest.raises(EngineClosedError):
                stream.result()
        with pytest.raises(EngineClosedError, match="cannot be reopened"):
            vlm.query(None, "q")
        with pytest.raises(EngineClosedError):
            vlm.restart()
    assert fake.engine.closed


def test_closing_while_others_wait_in_every_call() -> None:
    for _ in range(20):
        fake = FakeEngine.factory(echo, step_s=0.0002)
        vlm = EdgeVLM(engine=fake, max_queue=4)
        ends: list[str] = []

        def caller(vlm: EdgeVLM = vlm, ends: list[str] = ends) -> None:
            while True:
                try:
                    assert vlm.query(None, "q", timeout=20).text == f"q {WORDS}"
                except EngineClosedError:
                    ends.append("closed")
                    return

        threads = [threading.Thread(target=caller) for _ in range(8)]
        for thread in threads:
            thread.start()
        fake.wait_for("step", 5)
        vlm.close()
        for thread in threads:
            thread.join()
        assert len(ends) == 8


def test_draining_finishes_what_is_in_flight_and_takes_nothing_new() -> None:
    step = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step": step})
    with opened(fake) as vlm:
        streams = [vlm.stream(None, f"q{i}") for i in range(12)]
        fake.wait_for("step")
        assert not vlm.close(timeout=0.01, drain=True)
        assert vlm.state == "closing"
        with pytest.raises(EngineClosedError):
            vlm.query(None, "late")
        step.set()
        assert vlm.close(drain=True)
        assert [s.result().text for s in streams] == [f"q{i} {WORDS}" for i in range(12)]
    assert_each_ended_once(fake.engine)


def test_a_second_close_without_drain_ends_the_draining() -> None:
    step = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step": step})
    with opened(fake) as vlm:
        stream = vlm.stream(None, "q")
        fake.wait_for("step")
        vlm.close(timeout=0, drain=True)
        vlm.close(timeout=0)
        vlm.close(timeout=0, drain=True)
        step.set()
        assert vlm.close()
        with pytest.raises(EngineClosedError):
            stream.result()


def test_a_step_that_fails_while_draining_is_what_the_requests_hear_of() -> None:
    step = threading.Event()
    error = RuntimeError("broken")
    fake = FakeEngine.factory(echo, holds={"step": step}, faults=[Fault("step", error, 1)])
    with opened(fake) as vlm:
        stream = vlm.stream(None, "q")
        fake.wait_for("step")
        vlm.close(timeout=0, drain=True)
        step.set()
        with pytest.raises(EngineDeadError) as caught:
            stream.result()
        assert caught.value.__cause__ is error


def test_a_stuck_step_shows_as_stalled_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    step = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step": step})
    with opened(fake, stall_s=0.02) as vlm:
        stream = vlm.stream(None, "q")
        eventually(lambda: vlm.state == "stalled")
        assert isinstance(vlm.cause, EngineError) and "0.02 s" in str(vlm.cause)
        eventually(lambda: caplog.records)
        # Shorter than the step: whoever waits with a deadline is not held up by it.
        with pytest.raises(TimeoutError):
            vlm.query(None, "other", timeout=0.02)
        time.sleep(0.1)
        assert [r.message for r in caplog.records] == [str(vlm.cause)]
        step.set()
        assert stream.result().text == f"q {WORDS}"
        assert vlm.state == "ready" and vlm.cause is None


def test_closing_a_stalled_engine_returns_in_time_and_finishes_later() -> None:
    step = threading.Event()
    fake = FakeEngine.factory(holds={"step": step})
    with opened(fake, stall_s=0.01) as vlm:
        stream = vlm.stream(None, "q")
        fake.wait_for("step")
        eventually(lambda: vlm.state == "stalled")
        began = time.monotonic()
        assert not vlm.close(timeout=0.05)
        assert time.monotonic() - began < 5
        assert vlm.state == "closing"
        step.set()
        assert vlm.close()
        assert vlm.state == "closed" and fake.engine.closed
        with pytest.raises(EngineClosedError):
            stream.result()


def test_closing_a_dead_engine() -> None:
    fake = FakeEngine.factory(faults=[Fault("step", RuntimeError("broken"))])
    with opened(fake) as vlm:
        with pytest.raises(EngineDeadError):
            vlm.query(None, "q")
        in_threads([vlm.close] * 4)
        # It died, and closing does not hide it.
        assert vlm.state == "dead"
        assert vlm.cause is not None


def test_closing_from_inside_a_consumer_and_from_the_engines_own_thread() -> None:
    with opened(FakeEngine.factory(echo, step_s=0.001)) as vlm, pytest.raises(EngineClosedError):
        for _ in vlm.stream(None, "q", ignore_eos=True, max_tokens=10**6):
            vlm.close()
    assert vlm.state == "closed"
    fake = FakeEngine.factory()
    with opened(fake) as vlm:
        assert vlm.in_engine_thread(lambda engine: vlm.close()) is False
        eventually(lambda: vlm.state == "closed")


def test_an_engine_that_fails_to_close_is_closed_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for error in (RuntimeError("stuck"), SystemExit(1)):
        fake = FakeEngine.factory(faults=[Fault("close", error)])
        vlm = EdgeVLM(engine=fake)
        assert vlm.close() and vlm.state == "closed"
    assert len(caplog.records) == 2
