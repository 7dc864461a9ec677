"""Restarting, calls into the engine's thread, and engines that nobody refers to any more."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, FakeFactory, Fault
from molmo_edge.errors import EngineClosedError, EngineDeadError, EngineError, EngineStartError
from molmo_edge.interface import Update
from tests.engine.support import FOREVER, WORDS, echo, eventually, meanwhile, opened

pytestmark = pytest.mark.timeout(60)


def test_calls_run_in_the_engines_thread_which_cannot_wait_for_answers() -> None:
    fake = FakeEngine.factory(faults=[Fault("reset_caches", OSError(), 1)])
    with opened(fake) as vlm:
        assert vlm.in_engine_thread(lambda engine: engine is fake.engine)
        again = vlm.in_engine_thread(lambda _: vlm.in_engine_thread(lambda engine: engine.closed))
        assert again is False
        for error in (ZeroDivisionError, SystemExit):
            with pytest.raises(error):
                vlm.in_engine_thread(lambda engine, error=error: exec("raise error", locals()))
        for call in (lambda: vlm.query(None, "q"), vlm.restart):
            with pytest.raises(EngineError, match="own thread"):
                vlm.in_engine_thread(lambda engine, call=call: call())
        own = type("EngineDeadError", (Exception,), {"__module__": "vllm.v1.engine.exceptions"})
        with pytest.raises(EngineError, match="vLLM failed"):
            vlm.in_engine_thread(lambda engine: exec("raise own", {"own": own}))
        with pytest.raises(EngineError, match="caches failed: OSError"):
            vlm.reset_caches()
        vlm.reset_caches()
        assert fake.calls["reset_caches"] == 2 and vlm.state == "ready"


def test_a_call_that_waits_for_an_engine_that_dies_is_woken() -> None:
    step = threading.Event()
    faults = [Fault("step", RuntimeError("broken"), 1)]
    fake = FakeEngine.factory(holds={"step": step}, faults=faults)
    with opened(fake) as vlm:
        stream = vlm.stream(None, "q")
        fake.wait_for("step")
        with meanwhile(lambda: vlm.in_engine_thread(lambda engine: 1)) as end:
            eventually(lambda: not vlm._loop._inbox.empty())
            step.set()
        assert isinstance(end.exception(), EngineDeadError)
        assert stream.done


def test_restarting_a_living_engine_frees_the_old_one_first() -> None:
    fake = FakeEngine.factory(echo, step_s=0.001)
    with opened(fake) as vlm:
        stream = vlm.stream(None, "q", **FOREVER)
        for _ in range(2):
            vlm.restart()
            assert all(engine.closed for engine in fake.engines[:-1])
            assert vlm.query(None, "q").text == f"q {WORDS}"
        assert len(fake.engines) == 3
        with pytest.raises(EngineClosedError):
            stream.result()


def test_a_restart_that_fails_leaves_a_dead_engine_that_can_be_restarted() -> None:
    error = OSError("no device")
    with opened(FakeEngine.factory(echo, faults=[Fault("build", error, number=2)])) as vlm:
        with pytest.raises(EngineStartError):
            vlm.restart()
        assert vlm.state == "dead" and vlm.cause is error
        with pytest.raises(EngineDeadError):
            vlm.query(None, "q")
        vlm.restart()
        assert vlm.query(None, "q").text == f"q {WORDS}"


def test_a_close_during_a_restart_wins() -> None:
    build = threading.Event()
    build.set()
    fake = FakeEngine.factory(echo, holds={"build": build})
    with opened(fake) as vlm:
        build.clear()
        with meanwhile(vlm.restart) as end:
            fake.wait_for("build", 2)
            assert not vlm.close(timeout=0.01)
            build.set()
        assert vlm.close() and vlm.state == "closed"
        assert isinstance(end.exception(), EngineClosedError)
    assert all(engine.closed for engine in fake.engines)


def test_an_engine_that_nobody_refers_to_closes_after_the_answers_still_being_read() -> None:
    fake = FakeEngine.factory(echo)
    vlm = EdgeVLM(engine=fake)
    stream = vlm.stream(None, "q")
    gone = weakref.ref(vlm)
    del vlm
    gc.collect()
    assert gone() is None
    assert stream.result().text == f"q {WORDS}"
    eventually(lambda: fake.engine.closed)


def test_a_dead_engine_is_not_kept_alive_by_the_error_that_killed_it() -> None:
    class Heavy(FakeEngine):
        def step(self) -> list[Update]:
            tensors = self
            raise RuntimeError(f"broken with {type(tensors).__name__}")

    engines: list[weakref.ref[Heavy]] = []

    def build() -> Heavy:
        engine = Heavy(FakeFactory())
        engines.append(weakref.ref(engine))
        return engine

    with EdgeVLM(engine=build) as vlm:
        with pytest.raises(EngineDeadError) as caught:
            vlm.query(None, "q")
        eventually(lambda: not vlm._loop._thread.is_alive())
        gc.collect()
        assert engines[0]() is None
        assert caught.value.__cause__ is vlm.cause


def test_a_hundred_engines_leave_nothing() -> None:
    for i in range(100):
        with EdgeVLM(engine=FakeEngine.factory(echo)) as vlm:
            assert vlm.query(None, "q").text
            vlm.stream(None, "q")
        if i == 10:
            gc.collect()
            before = len(gc.get_objects())
    del vlm
    gc.collect()
    assert len(gc.get_objects()) - before < 500
