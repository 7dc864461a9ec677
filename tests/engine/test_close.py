"""Starting that fails, stalls, and closing: in every state, repeatedly, from any thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

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
    FOREVER,
    WORDS,
    assert_each_ended_once,
    echo,
    eventually,
    in_threads,
    meanwhile,
    opened,
)

pytestmark = pytest.mark.timeout(60)


@contextmanager
def handler(emit: object) -> Iterator[None]:
    """A log handler of the library's errors."""
    one = logging.Handler(logging.ERROR)
    one.emit = emit  # type: ignore[assignment,method-assign]
    logger = logging.getLogger("molmo_edge")
    logger.addHandler(one)
    try:
        yield
    finally:
        logger.removeHandler(one)


def test_a_loop_never_started_closes_at_once_and_stays_closed() -> None:
    fake = FakeEngine.factory()
    loop = EngineLoop(fake)
    assert loop.state == "new"
    assert loop.close() and loop.close()
    assert loop.state == "closed"
    with pytest.raises(EngineClosedError):
        loop.start()
    assert fake.engines == []


@pytest.mark.parametrize("faults", [[], [Fault("build", OSError())]])
def test_closing_while_starting_ends_the_start_and_frees_the_engine(faults: list[Fault]) -> None:
    build = threading.Event()
    fake = FakeEngine.factory(holds={"build": build}, faults=faults)
    loop = EngineLoop(fake)
    with meanwhile(loop.start) as ends:
        fake.wait_for("build")
        assert loop.state == "starting"
        assert not loop.close(timeout=0.01)
    # The start ended before the building did.
    assert [type(end) for end in ends] == [EngineClosedError]
    build.set()
    assert loop.close() and loop.state == "closed"
    assert all(engine.closed for engine in fake.engines)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("boom"), EngineStartError),
        (ConfigError("wrong"), ConfigError),
        (SystemExit(3), EngineStartError),
    ],
)
def test_a_start_that_fails_reaches_the_caller_of_the_constructor(
    error: BaseException, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        EdgeVLM(engine=FakeEngine.factory(faults=[Fault("build", error)]))
    assert error in (caught.value, caught.value.__cause__)


def test_closing_an_idle_engine_repeatedly_and_from_many_threads() -> None:
    fake = FakeEngine.factory()
    with opened(fake) as vlm:
        in_threads([vlm.close] * 8)
        assert vlm.close() and vlm.state == "closed"
    assert fake.calls["close"] == 1


def test_closing_a_busy_engine_ends_its_requests() -> None:
    fake = FakeEngine.factory(step_s=0.001)
    with opened(fake) as vlm:
        streams = [vlm.stream(None, "q", **FOREVER) for _ in range(10)]
        next(streams[0])
        vlm.close()
        for stream in streams:
            with pytest.raises(EngineClosedError):
                stream.result()
        for call in (lambda: vlm.query(None, "q"), vlm.restart):
            with pytest.raises(EngineClosedError, match="cannot be reopened"):
                call()
    assert fake.engine.closed


def test_closing_while_others_submit() -> None:
    for _ in range(8):
        fake = FakeEngine.factory(echo, step_s=0.0002)
        with opened(fake, max_queue=4) as vlm:

            def caller(vlm: EdgeVLM = vlm) -> None:
                with pytest.raises(EngineClosedError):
                    while True:
                        assert vlm.query(None, "q", timeout=40).text == f"q {WORDS}"

            in_threads([caller] * 8 + [lambda f=fake, v=vlm: (f.wait_for("step", 5), v.close())])  # type: ignore[misc]


@pytest.mark.parametrize("end", ["finished", "closed again", "died"])
def test_draining_finishes_requests_in_flight_and_takes_no_new_ones(end: str) -> None:
    step, error = threading.Event(), RuntimeError("broken")
    faults = [Fault("step", error, 1)] if end == "died" else []
    fake = FakeEngine.factory(echo, holds={"step": step}, faults=faults)
    with opened(fake) as vlm:
        streams = [vlm.stream(None, f"q{i}") for i in range(12)]
        fake.wait_for("step")
        assert not vlm.close(timeout=0.01, drain=True)
        assert vlm.state == "closing"
        with pytest.raises(EngineClosedError):
            vlm.query(None, "late")
        if end == "closed again":
            vlm.close(timeout=0)
        step.set()
        assert vlm.close(drain=True)
        if end == "finished":
            assert [s.result().text for s in streams] == [f"q{i} {WORDS}" for i in range(12)]
            assert_each_ended_once(fake.engine)
            return
        for stream in streams:
            with pytest.raises(EngineDeadError if end == "died" else EngineClosedError) as caught:
                stream.result()
            assert caught.value.__cause__ is (error if end == "died" else None)


def test_a_stuck_step_shows_as_stalled_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    step = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step": step})
    with opened(fake, stall_s=0.02) as vlm:
        stream = vlm.stream(None, "q")
        eventually(lambda: caplog.records)
        assert vlm.state == "stalled"
        assert isinstance(vlm.cause, EngineError) and "0.02 s" in str(vlm.cause)
        # Callers with a deadline are not held up, and the stall is reported once.
        with pytest.raises(TimeoutError):
            vlm.query(None, "other", timeout=0.1)
        assert [r.message for r in caplog.records] == [str(vlm.cause)]
        step.set()
        assert stream.result().text == f"q {WORDS}"
        assert vlm.state == "ready" and vlm.cause is None


def test_closing_a_stalled_engine_returns_in_time_and_finishes_later() -> None:
    step = threading.Event()
    fake = FakeEngine.factory(holds={"step": step})
    with opened(fake, stall_s=0.01) as vlm:
        stream = vlm.stream(None, "q")
        eventually(lambda: vlm.state == "stalled")
        assert not vlm.close(timeout=0.05)
        assert vlm.state == "closing"
        step.set()
        assert vlm.close() and vlm.state == "closed" and fake.engine.closed
        with pytest.raises(EngineClosedError):
            stream.result()


def test_a_log_handler_may_close_a_stalled_engine() -> None:
    step, closed = threading.Event(), []
    with opened(FakeEngine.factory(holds={"step": step}), stall_s=0.01) as vlm:

        def close(record: logging.LogRecord) -> None:
            step.set()
            closed.append(vlm.close())

        with handler(close):
            stream = vlm.stream(None, "q")
            eventually(lambda: closed == [True])
        assert stream.done


def test_waiters_are_woken_before_the_log_is_written() -> None:
    woken = []
    with opened(FakeEngine.factory(faults=[Fault("step", RuntimeError())])) as vlm:
        stream = vlm.stream(None, "q")
        with handler(lambda record: woken.append(stream.done)):
            eventually(lambda: woken)
    assert woken == [True]


def test_closing_a_dead_engine() -> None:
    with opened(FakeEngine.factory(faults=[Fault("step", RuntimeError("broken"))])) as vlm:
        with pytest.raises(EngineDeadError):
            vlm.query(None, "q")
        in_threads([vlm.close] * 4)
        assert vlm.state == "dead" and vlm.cause is not None


def test_closing_from_a_consumer_and_from_the_engines_own_thread() -> None:
    with opened(FakeEngine.factory(echo, step_s=0.001)) as vlm, pytest.raises(EngineClosedError):
        for _ in vlm.stream(None, "q", **FOREVER):
            vlm.close()
    assert vlm.state == "closed"
    with opened(FakeEngine.factory()) as vlm:
        assert vlm.in_engine_thread(lambda engine: vlm.close()) is False
        eventually(lambda: vlm.state == "closed")


@pytest.mark.parametrize("error", [RuntimeError("stuck"), SystemExit(1)])
def test_an_engine_that_fails_to_close_is_closed_all_the_same(
    caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    vlm = EdgeVLM(engine=FakeEngine.factory(faults=[Fault("close", error)]))
    assert vlm.close() and vlm.state == "closed"
    assert len(caplog.records) == 1
