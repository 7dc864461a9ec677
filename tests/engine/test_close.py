"""Starting that fails, stalls, and closing: in every state, repeatedly, from any thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, Fault
from molmo_edge.engine.loop import EngineLoop
from molmo_edge.errors import (
    CameraError,
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    EngineStartError,
    GenerationError,
)
from tests.engine.support import FOREVER, WORDS, echo, eventually, in_threads, meanwhile, opened

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("faults", [[], [Fault("build", OSError())]])
def test_closing_while_starting_ends_the_start_and_frees_the_engine(faults: list[Fault]) -> None:
    build = threading.Event()
    fake = FakeEngine.factory(holds={"build": build}, faults=faults)
    loop = EngineLoop(fake)
    with meanwhile(loop.start) as end:
        fake.wait_for("build")
        assert loop.state == "starting"
        assert not loop.close(timeout=0.01)
    # The start ended before the building did.
    assert isinstance(end.exception(), EngineClosedError)
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


def test_a_thread_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def ask(vlm: EdgeVLM) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(EngineStartError, match="thread"):
                EdgeVLM(engine=FakeEngine.factory())
            with pytest.raises(CameraError, match="thread"):
                next(vlm.watch([b""]))
            with pytest.raises(GenerationError):
                await vlm.aquery(None, "q")
            with pytest.raises(GenerationError):
                await vlm.apoint(b"", ["a", "b"])
            with pytest.raises(CameraError, match="thread"):
                await anext(vlm.awatch([b""]))
            async with other:
                pass

    other = EdgeVLM(engine=FakeEngine.factory())
    with opened(FakeEngine.factory(echo)) as vlm:
        asyncio.run(ask(vlm))
        assert other.state == "closed"
        assert vlm.query(None, "q").text == f"q {WORDS}"


@pytest.mark.parametrize("timeout", [10**400, float("nan"), "x"])
def test_a_timeout_that_is_none_is_refused_and_nothing_is_closed(timeout: Any) -> None:
    with opened(FakeEngine.factory(echo)) as vlm:
        with pytest.raises(ConfigError, match="timeout"):
            vlm.close(timeout)
        assert vlm.query(None, "q").text == f"q {WORDS}"


def test_closing_from_many_threads_ends_all_requests_and_refuses_new_ones() -> None:
    fake = FakeEngine.factory(echo, step_s=0.001)
    with opened(fake) as vlm:
        streams = [vlm.stream(None, "q", **FOREVER) for _ in range(4)]

        def caller() -> None:
            with pytest.raises(EngineClosedError):
                while True:
                    assert vlm.query(None, "q", timeout=40).text == f"q {WORDS}"

        def closer() -> None:
            fake.wait_for("step", 5)
            vlm.close()

        in_threads([caller, closer] * 8)
        assert vlm.close() and (vlm.state, vlm.cause) == ("closed", None)
        for stream in streams:
            with pytest.raises(EngineClosedError):
                stream.result()
        for call in (lambda: vlm.query(None, "q"), vlm.restart):
            with pytest.raises(EngineClosedError, match="cannot be reopened"):
                call()
    assert fake.calls["close"] == 1


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
            return
        for stream in streams:
            with pytest.raises(EngineDeadError if end == "died" else EngineClosedError) as caught:
                stream.result()
            assert caught.value.__cause__ is (error if end == "died" else None)


def test_a_stalled_engine_recovers_and_closes_in_time() -> None:
    step = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step": step})
    with opened(fake, stall_s=0.02) as vlm:
        stream = vlm.stream(None, "q")
        eventually(lambda: vlm.state == "stalled")
        # Callers with a deadline are not held up.
        with pytest.raises(TimeoutError):
            vlm.query(None, "other", timeout=0.1)
        step.set()
        assert stream.result().text == f"q {WORDS}"
        assert vlm.state == "ready"
        step.clear()
        stream = vlm.stream(None, "q")
        eventually(lambda: vlm.state == "stalled")
        assert not vlm.close(timeout=0.05)
        assert vlm.state == "closing"
        step.set()
        assert vlm.close() and vlm.state == "closed" and fake.engine.closed
        with pytest.raises(EngineClosedError):
            stream.result()


@pytest.mark.parametrize(
    ("error", "advice"), [(RuntimeError("broken"), "restart"), (MemoryError(), "max_num_seqs")]
)
def test_a_dead_engine_says_why_and_closes(error: Exception, advice: str) -> None:
    with opened(FakeEngine.factory(faults=[Fault("step", error)])) as vlm:
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=type(error).__name__) as caught:
                vlm.query(None, "q")
            assert caught.value.__cause__ is vlm.cause is error
            assert advice in str(caught.value)
        assert vlm.close() and vlm.state == "dead"


def test_closing_from_a_consumer_and_from_the_engines_own_thread() -> None:
    with opened(FakeEngine.factory(echo, step_s=0.001)) as vlm, pytest.raises(EngineClosedError):
        for _ in vlm.stream(None, "q", **FOREVER):
            vlm.close()
    with opened(FakeEngine.factory()) as vlm:
        assert vlm.in_engine_thread(lambda engine: vlm.close()) is False
        eventually(lambda: vlm.state == "closed")


def test_an_engine_that_fails_to_close_is_closed_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vlm = EdgeVLM(engine=FakeEngine.factory(faults=[Fault("close", RuntimeError("stuck"))]))
    assert vlm.close() and vlm.state == "closed"
    assert len(caplog.records) == 1
