"""Many callers at once: no hang, no leak, every request ends exactly once."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest

from molmo_edge import EdgeVLM, MolmoEdgeError, Request
from molmo_edge.engine.fake import FakeEngine, Fault
from molmo_edge.errors import (
    EngineDeadError,
    PromptError,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
)
from tests.engine.support import (
    FOREVER,
    WORDS,
    assert_all_ended,
    echo,
    eventually,
    in_threads,
    meanwhile,
    opened,
)

pytestmark = pytest.mark.timeout(120)
THREADS, REQUESTS = 24, 30


def _one(vlm: EdgeVLM, dice: random.Random, text: str) -> str:
    """One request of a random kind, checked; returns the kind."""
    kind = dice.choice(["query", "query", "cancel", "timeout", "leave", "bad"])
    if kind == "query":
        assert vlm.query(None, text, timeout=100).text == f"{text} {WORDS}"
    elif kind == "cancel":
        stream = vlm.stream(None, text, timeout=100, **FOREVER)
        for _ in range(dice.randrange(4)):
            next(stream)
        stream.cancel()
        with pytest.raises(RequestCancelled):
            stream.result()
    elif kind == "timeout":
        with pytest.raises(RequestTimeout) as caught:
            vlm.query(None, text, timeout=dice.random() * 0.01, **FOREVER)
        assert f"{text} {WORDS}".startswith(caught.value.partial[: len(text)])
    elif kind == "leave":
        for delta in vlm.stream(None, text, timeout=100):
            assert delta
            break
    else:
        with pytest.raises(PromptError):
            vlm.query(None, "")
    return kind


def test_each_of_many_callers_gets_its_own_answer() -> None:
    fake = FakeEngine.factory(echo, step_s=0.0005)
    kinds: Counter[str] = Counter()
    with opened(fake, max_queue=16) as vlm:

        def caller(number: int) -> None:
            dice = random.Random(number)
            for i in range(REQUESTS):
                kinds[_one(vlm, dice, f"q{number}-{i}")] += 1

        in_threads([lambda n=n: caller(n) for n in range(THREADS)])  # type: ignore[misc]
        assert_all_ended(vlm, fake)
    assert sum(kinds.values()) == THREADS * REQUESTS and len(kinds) == 5
    assert len(set(fake.engine.added)) == len(fake.engine.added)


def test_an_engine_that_fails_at_any_step_wakes_every_caller_and_restarts() -> None:
    for number in range(1, 36, 3):
        error = RuntimeError("broken")
        fake = FakeEngine.factory(echo, faults=[Fault("step", error, number)])
        ends: Counter[str] = Counter()
        with opened(fake) as vlm:

            def caller(text: str, vlm: EdgeVLM = vlm, ends: Counter[str] = ends) -> None:
                for i in range(3):
                    try:
                        assert vlm.query(None, f"{text}{i}").text == f"{text}{i} {WORDS}"
                        ends["answered"] += 1
                    except EngineDeadError as exc:
                        assert isinstance(exc.__cause__, RuntimeError)
                        ends["dead"] += 1

            in_threads([lambda t=t: caller(t) for t in "abc"])  # type: ignore[misc]
            # 3 answers of 12 tokens, one after the other: at least 36 steps.
            assert sum(ends.values()) == 9 and ends["dead"] > 0
            assert vlm.state == "dead" and vlm.cause is error
            assert fake.calls["step"] == number and fake.calls["build"] == 1  # no retry
            vlm.restart()
            assert fake.engines[0].closed and vlm.state == "ready" and vlm.cause is None
            assert vlm.query(None, "again").text == f"again {WORDS}"


@pytest.mark.parametrize("call", ["add", "render"])
def test_a_request_that_the_engine_refuses_is_its_own_failure(call: str) -> None:
    fake = FakeEngine.factory(echo, faults=[Fault(call, RuntimeError("secret"), number=2)])
    with opened(fake) as vlm:
        results = vlm.batch([Request(None, t) for t in "abc"], return_exceptions=True)
        assert [str(results[0]), str(results[2])] == [f"a {WORDS}", f"c {WORDS}"]
        assert isinstance(results[1], MolmoEdgeError) and "secret" not in str(results[1])
        assert isinstance(results[1].__cause__, RuntimeError)
        assert vlm.state == "ready" and vlm._loop._in_flight == 0


def test_a_full_queue_refuses_at_once_or_waits_for_room_until_the_deadline() -> None:
    step = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step": step})
    with opened(fake, max_queue=2) as vlm:
        held = [vlm.stream(None, t) for t in "ab"]
        fake.wait_for("step")
        with pytest.raises(QueueFull, match="2 requests"):
            vlm.query(None, "c")
        with pytest.raises(RequestTimeout):
            vlm.query(None, "c", timeout=0.02)
        with meanwhile(lambda: vlm.query(None, "d", timeout=100).text) as answer:
            eventually(lambda: vlm._loop.changed._waiters)
            step.set()
        assert answer.result() == f"d {WORDS}"
        assert [s.result().text for s in held] == [f"a {WORDS}", f"b {WORDS}"]
        results = vlm.batch([Request(None, f"q{i}") for i in range(40)])  # waits for room
        assert [r.text for r in results] == [f"q{i} {WORDS}" for i in range(40)]
        assert_all_ended(vlm, fake)


def test_waiting_for_room_ends_with_the_engine() -> None:
    step = threading.Event()
    faults = [Fault("step", RuntimeError("broken"))]
    fake = FakeEngine.factory(echo, holds={"step": step}, faults=faults)
    requests = [Request(None, t) for t in "abc"]
    with opened(fake, max_queue=1) as vlm:
        with meanwhile(lambda: vlm.batch(requests, return_exceptions=True)) as results:
            eventually(lambda: vlm._loop.changed._waiters)
            step.set()
        assert [type(end) for end in results.result()] == [EngineDeadError] * 3
