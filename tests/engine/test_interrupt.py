"""Ctrl-C, fork and interpreter exit: the next call is right, and nothing hangs."""

from __future__ import annotations

import os
import random
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from molmo_edge import EdgeVLM, Request
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.engine.loop import _LIVE
from tests.engine.support import (
    FOREVER,
    WORDS,
    assert_all_ended,
    echo,
    eventually,
    meanwhile,
    opened,
    run_script,
)

pytestmark = pytest.mark.timeout(120)


Interrupted = Callable[[Callable[[], object], Callable[[], object]], bool]


@pytest.fixture
def interrupted() -> Iterator[Interrupted]:
    """Run a call, send Ctrl-C after `wait()`, and return whether it hit the call."""
    armed = False

    def handle(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    def run(call: Callable[[], object], wait: Callable[[], object]) -> bool:
        nonlocal armed
        ended = threading.Event()

        def send() -> None:
            wait()
            os.kill(os.getpid(), signal.SIGINT)
            while not ended.wait(1):  # it came before the call, or Python lost it in a finalizer
                os.kill(os.getpid(), signal.SIGINT)

        with meanwhile(send):
            try:
                try:
                    armed = True
                    call()
                finally:
                    armed = False
                    ended.set()
            except KeyboardInterrupt:
                armed = False
                return True
            return False

    before = signal.signal(signal.SIGINT, handle)
    yield run
    signal.signal(signal.SIGINT, before)


def _frames() -> Iterator[np.ndarray]:
    while True:
        time.sleep(0.001)
        yield np.zeros((8, 8, 3), np.uint8)


def _calls(vlm: EdgeVLM) -> dict[str, Callable[[], object]]:
    return {
        "query": lambda: vlm.query(None, "q", **FOREVER),
        "stream": lambda: [*vlm.stream(None, "q", **FOREVER)],
        "batch": lambda: vlm.batch([Request(None, "q", **FOREVER)] * 5),
        "room": lambda: vlm.query(None, "q", timeout=100, **FOREVER),
        "call": lambda: vlm.in_engine_thread(lambda engine: time.sleep(0.5)),
        "watch": lambda: [*vlm.watch(_frames)],
        "close": lambda: EdgeVLM(engine=FakeEngine.factory(echo)).close(),
    }


@pytest.mark.parametrize("kind", ["query", "stream", "batch", "room", "call"])
def test_an_interrupted_call_leaves_the_next_one_right(interrupted: Interrupted, kind: str) -> None:
    fake = FakeEngine.factory(echo, step_s=0.001)
    with opened(fake, max_queue=1 if kind == "room" else 8) as vlm:
        other = vlm.stream(None, "q", **FOREVER) if kind == "room" else None
        waits = {
            "room": lambda: eventually(lambda: vlm._loop.changed._waiters),
            "call": lambda: time.sleep(0.05),
        }
        wait = waits.get(kind, lambda: fake.wait_for("step", 20))
        assert interrupted(_calls(vlm)[kind], wait)
        if other is not None:
            other.cancel()
        assert_all_ended(vlm, fake)


# Ctrl-C in a standard module may leave a directory to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_random_moments_leave_no_lock_and_no_request(
    interrupted: Interrupted,
) -> None:
    dice = random.Random(4)
    fake = FakeEngine.factory(echo, step_s=0.0002)
    hits, before = 0, set(_LIVE)  # engines of the session
    with opened(fake) as vlm:
        calls = _calls(vlm)
        for i in range(60):
            kind = dice.choice(["query", "stream", "batch", "watch", "close"])
            hits += interrupted(calls[kind], lambda: time.sleep(dice.random() * 0.004))
            assert vlm.query(None, f"n{i}", timeout=60).text == f"n{i} {WORDS}"
        assert_all_ended(vlm, fake)
        assert vlm._loop.changed._waiters == []
        eventually(lambda: _LIVE - before == {vlm._loop})
    assert hits > 30


def test_an_interrupted_close_can_be_called_again(interrupted: Interrupted) -> None:
    step = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step": step})
    with opened(fake) as vlm:
        stream = vlm.stream(None, "q")
        fake.wait_for("step")
        assert interrupted(vlm.close, lambda: eventually(lambda: vlm.state == "closing"))
        step.set()
        assert vlm.close() and fake.engine.closed
        assert stream.done


def test_an_interrupted_constructor_leaves_no_engine(interrupted: Interrupted) -> None:
    build = threading.Event()
    fake = FakeEngine.factory(holds={"build": build})
    assert interrupted(lambda: EdgeVLM(engine=fake), lambda: fake.wait_for("build"))
    build.set()
    eventually(lambda: fake.engines and fake.engine.closed)


_FORKED = """
    import asyncio, os, sys
    from molmo_edge import EdgeVLM, Request
    from molmo_edge.engine import vllm_engine
    from molmo_edge.engine.fake import FakeEngine
    from molmo_edge.errors import EngineForkedError

    vlm = EdgeVLM(engine=FakeEngine.factory("one two three", step_s=0.001))
    busy = vlm.stream(None, "q", ignore_eos=True, max_tokens=2000)
    asyncio.run(vlm.aquery(None, "q"))
    done = vlm.stream(None, "q")
    done.result()

    def child():
        for call in (
            lambda: vlm.query(None, "q"),
            lambda: vlm.batch([Request(None, "q")]),
            lambda: busy.result(),
            lambda: asyncio.run(vlm.aquery(None, "q")),
            lambda: vlm.in_engine_thread(lambda engine: 1),
            vlm.restart,
        ):
            try:
                call()
            except EngineForkedError as exc:
                assert "parent" in str(exc)
            else:
                raise AssertionError("not refused")
        busy.cancel()
        assert done.result().text == "one two three"
        assert vlm.close()
        with EdgeVLM(engine=FakeEngine.factory("mine")) as own:
            assert own.query(None, "q").text == "mine"
        assert vllm_engine._ENVIRONMENT.acquire(timeout=1)

    with vllm_engine._ENVIRONMENT:  # as another engine's start may hold it
        pid = os.fork()
        if pid == 0:
            child()
            sys.exit(7)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7, status
    assert vlm.query(None, "q").text == "one two three"
    assert busy.result().metrics.output_tokens == 2000
    assert vlm.close()
"""


def test_a_forked_child_is_refused_at_once_and_exits_cleanly() -> None:
    done = run_script(_FORKED)
    assert done.returncode == 0, done.stderr


_EXIT = """
    import contextlib, signal, threading
    import molmo_edge.engine.loop
    from molmo_edge import EdgeVLM
    from molmo_edge.engine.fake import FakeEngine
    never = threading.Event()
    forever = {"ignore_eos": True, "max_tokens": 10**6}
"""
_EXITS = {
    "busy": """
        vlm = EdgeVLM(engine=FakeEngine.factory(step_s=0.001))
        streams = [vlm.stream(None, "q", **forever) for _ in range(4)]
        next(streams[0])
        """,
    "stuck": """
        molmo_edge.engine.loop._EXIT_S = 0.5
        fake = FakeEngine.factory(holds={"step": never})
        vlm = EdgeVLM(engine=fake)
        stream = vlm.stream(None, "q")
        fake.wait_for("step")
        """,
    "daemon thread": """
        fake = FakeEngine.factory(step_s=0.001)
        vlm = EdgeVLM(engine=fake)
        def ask():
            # A daemon thread that prints while Python ends can be fatal to it.
            with contextlib.suppress(molmo_edge.MolmoEdgeError):
                vlm.query(None, "q", **forever)
        threading.Thread(target=ask, daemon=True).start()
        fake.wait_for("step")
        """,
    "ctrl-c": """
        vlm = EdgeVLM(engine=FakeEngine.factory(step_s=0.001))
        for _ in vlm.stream(None, "q", **forever):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.raise_signal(signal.SIGINT)
        """,
}


@pytest.mark.parametrize("way", _EXITS)
def test_interpreter_exit_does_not_hang(way: str) -> None:
    done = run_script(textwrap.dedent(_EXIT) + textwrap.dedent(_EXITS[way]))
    assert done.returncode == (-signal.SIGINT if way == "ctrl-c" else 0), done.stderr
    if way in ("busy", "stuck"):
        assert "Traceback" not in done.stderr
