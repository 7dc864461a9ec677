"""Ctrl-C, fork and the interpreter's exit: the next call is right, and nothing hangs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from molmo_edge import EdgeVLM, Request
from molmo_edge.engine.fake import FakeEngine
from tests.engine.support import (
    FOREVER,
    WORDS,
    assert_each_ended_once,
    echo,
    eventually,
    opened,
    run_script,
)

pytestmark = pytest.mark.timeout(90)


class CtrlC:
    """Sends SIGINT to the main thread; outside `armed` it does nothing there."""

    def __init__(self) -> None:
        self._armed = False

    def handle(self, *_: object) -> None:
        if self._armed:
            raise KeyboardInterrupt

    def hits(self, call: Callable[[], object]) -> bool:
        """Whether the call was interrupted."""
        try:
            try:
                self._armed = True
                call()
            finally:
                self._armed = False
        except KeyboardInterrupt:
            self._armed = False
            return True
        return False

    @staticmethod
    @contextmanager
    def after(seconds: float) -> Iterator[None]:
        main = threading.main_thread().ident
        assert main is not None

        def send() -> None:
            time.sleep(seconds)
            signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield
        finally:
            thread.join()


@pytest.fixture
def ctrl_c() -> Iterator[CtrlC]:
    one = CtrlC()
    before = signal.signal(signal.SIGINT, one.handle)
    yield one
    signal.signal(signal.SIGINT, before)


def _calls(vlm: EdgeVLM) -> dict[str, Callable[[], object]]:
    chat = [{"role": "user", "content": "q"}]
    return {
        "query": lambda: vlm.query(None, "q", **FOREVER),
        "stream": lambda: [*vlm.stream(None, "q", **FOREVER)],
        "chat": lambda: vlm.chat(chat, **FOREVER),
        "batch": lambda: vlm.batch([Request(None, "q", **FOREVER)] * 5),
        "room": lambda: vlm.query(None, "q", timeout=60, **FOREVER),
        "call": lambda: vlm.in_engine_thread(lambda engine: time.sleep(0.3)),
        "close": lambda: vlm.close(),
    }


@pytest.mark.parametrize("kind", ["query", "stream", "chat", "batch", "room", "call"])
def test_an_interrupted_call_leaves_the_next_one_right(ctrl_c: CtrlC, kind: str) -> None:
    fake = FakeEngine.factory(echo, step_s=0.001)
    with opened(fake, max_queue=1 if kind == "room" else 8) as vlm:
        other = vlm.stream(None, "q", **FOREVER) if kind == "room" else None
        with ctrl_c.after(0.05):
            assert ctrl_c.hits(_calls(vlm)[kind])
        if other is not None:
            other.cancel()
        eventually(lambda: not fake.engine.running)
        eventually(lambda: vlm._loop._in_flight == 0)
        assert vlm.query(None, "next").text == f"next {WORDS}"
    assert_each_ended_once(fake.engine)


def test_a_storm_of_interrupts_at_any_moment_leaves_no_lock_and_no_request(ctrl_c: CtrlC) -> None:
    dice = random.Random(4)
    fake = FakeEngine.factory(echo, step_s=0.0002)
    hits = 0
    with opened(fake) as vlm:
        calls = _calls(vlm)
        for i in range(150):
            kind = dice.choice(["query", "stream", "chat", "batch"])
            with ctrl_c.after(dice.random() * 0.004):
                hits += ctrl_c.hits(calls[kind])
            assert vlm.query(None, f"n{i}", timeout=30).text == f"n{i} {WORDS}"
        eventually(lambda: not fake.engine.running)
        assert vlm._loop._in_flight == 0
    assert hits > 120
    assert_each_ended_once(fake.engine)


def test_an_interrupted_close_can_be_called_again(ctrl_c: CtrlC) -> None:
    step = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step": step})
    with opened(fake) as vlm:
        stream = vlm.stream(None, "q")
        fake.wait_for("step")
        with ctrl_c.after(0.02):
            assert ctrl_c.hits(vlm.close)
        step.set()
        assert vlm.close() and fake.engine.closed
        assert stream.done


def test_an_interrupted_constructor_leaves_no_engine(ctrl_c: CtrlC) -> None:
    build = threading.Event()
    fake = FakeEngine.factory(holds={"build": build})
    with ctrl_c.after(0.02):
        assert ctrl_c.hits(lambda: EdgeVLM(engine=fake))
    build.set()
    eventually(lambda: fake.engines and fake.engine.closed)


_FORKED = """
    import asyncio, os, sys, threading, time
    from molmo_edge import EdgeVLM
    from molmo_edge.engine.fake import FakeEngine
    from molmo_edge.errors import EngineForkedError

    vlm = EdgeVLM(engine=FakeEngine.factory("one two three", step_s=0.001))
    busy = vlm.stream(None, "q", ignore_eos=True, max_tokens=2000)
    asyncio.run(vlm.aquery(None, "q"))
    done = vlm.stream(None, "q")
    done.result()

    def refused(call):
        try:
            call()
        except EngineForkedError as exc:
            assert "parent" in str(exc)
        else:
            raise AssertionError("not refused")

    def child():
        refused(lambda: vlm.query(None, "q"))
        refused(lambda: vlm.batch([__import__("molmo_edge").Request(None, "q")]))
        refused(lambda: next(vlm.stream(None, "q")))
        refused(lambda: busy.result())
        refused(lambda: asyncio.run(vlm.aquery(None, "q")))
        refused(lambda: asyncio.run(busy.aresult()))
        refused(lambda: vlm.in_engine_thread(lambda engine: 1))
        refused(vlm.restart)
        busy.cancel()
        assert done.result().text == "one two three"
        assert vlm.close()
        # An engine of its own works.
        with EdgeVLM(engine=FakeEngine.factory("mine")) as own:
            assert own.query(None, "q").text == "mine"

"""


def test_a_forked_child_is_refused_at_once_and_exits_cleanly() -> None:
    script = textwrap.dedent(_FORKED) + textwrap.dedent("""
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                child()
                sys.exit(7)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 7, status
        assert vlm.query(None, "q").text == "one two three"
        assert busy.result().metrics.output_tokens == 2000
        assert vlm.close()
        """)
    done = run_script(script)
    assert done.returncode == 0, done.stderr


def test_a_multiprocessing_child_is_refused_and_exits_cleanly() -> None:
    script = textwrap.dedent(_FORKED) + textwrap.dedent("""
        import multiprocessing
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 0, process.exitcode
        assert vlm.query(None, "q").text == "one two three"
        """)
    done = run_script(script)
    assert done.returncode == 0, done.stderr


_EXIT = """
    import asyncio, sys, threading, time
    import molmo_edge.engine.loop
    from molmo_edge import EdgeVLM
    from molmo_edge.engine.fake import FakeEngine, Fault
    never = threading.Event()
    forever = {"ignore_eos": True, "max_tokens": 10**6}
"""
_EXITS = {
    "idle": """
        vlm = EdgeVLM(engine=FakeEngine.factory())
        vlm.query(None, "q")
        """,
    "busy": """
        fake = FakeEngine.factory(step_s=0.001)
        vlm = EdgeVLM(engine=fake)
        streams = [vlm.stream(None, "q", **forever) for _ in range(4)]
        next(streams[0])
        vlm.query(None, "q")
        """,
    "stuck": """
        molmo_edge.engine.loop._EXIT_S = 0.5
        fake = FakeEngine.factory(holds={"step": never})
        vlm = EdgeVLM(engine=fake)
        stream = vlm.stream(None, "q")
        fake.wait_for("step")
        """,
    "stuck, with a deadline for exit of five seconds": """
        fake = FakeEngine.factory(holds={"step": never})
        vlm = EdgeVLM(engine=fake)
        stream = vlm.stream(None, "q")
        fake.wait_for("step")
        """,
    "dead": """
        vlm = EdgeVLM(engine=FakeEngine.factory(faults=[Fault("step", RuntimeError("broken"))]))
        try:
            vlm.query(None, "q")
        except molmo_edge.MolmoEdgeError:
            pass
        """,
    "daemon thread asking": """
        vlm = EdgeVLM(engine=FakeEngine.factory(step_s=0.001))
        threading.Thread(target=vlm.query, args=(None, "q"), kwargs=forever, daemon=True).start()
        time.sleep(0.1)
        """,
    "in a cycle": """
        holder = [EdgeVLM(engine=FakeEngine.factory(step_s=0.001))]
        holder.append([holder, holder[0].stream(None, "q", **forever)])
        """,
    "unhandled error": """
        vlm = EdgeVLM(engine=FakeEngine.factory(step_s=0.001))
        for _ in vlm.stream(None, "q", **forever):
            sys.exit(0)
        """,
}


@pytest.mark.parametrize("way", _EXITS)
def test_the_interpreters_exit_does_not_hang(way: str) -> None:
    began = time.monotonic()
    done = run_script(textwrap.dedent(_EXIT) + textwrap.dedent(_EXITS[way]))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30
    # A thread that still asks may have its say, if it is quick.
    if way != "daemon thread asking":
        assert ("Traceback" in done.stderr) == (way == "dead")


def test_ctrl_c_in_a_script_ends_it() -> None:
    script = textwrap.dedent(_EXIT) + textwrap.dedent("""
        import signal
        # Shells start what runs in their background with SIGINT ignored, and that is inherited.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        vlm = EdgeVLM(engine=FakeEngine.factory(step_s=0.001))
        print("asking", flush=True)
        vlm.query(None, "q", **forever)
        """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err
