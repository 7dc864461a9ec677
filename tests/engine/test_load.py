"""Many callers at once: no hang, no leak, every request ends exactly once."""

from __future__ import annotations

import random
import threading
import time
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
    WORDS,
    assert_each_ended_once,
    echo,
    eventually,
    in_threads,
    opened,
)

THREADS, REQUESTS = 32, 50


def _one(vlm: EdgeVLM, dice: random.Random, text: str) -> str:
    """One request of a random kind; returns how it ended, having looked at what it brought."""
    kind = dice.choice(["query", "query", "stream", "cancel", "timeout", "drop", "leave", "bad"])
    if kind == "query":
        result = vlm.query(None, text, timeout=60)
        assert result.text == f"{text} {WORDS}"
    elif kind == "stream":
        assert "".join(vlm.stream(None, text, timeout=60)) == f"{text} {WORDS}"
    elif kind == "cancel":
        stream = vlm.stream(None, text, timeout=60, ignore_eos=True, max_tokens=10**6)
        for _ in range(dice.randrange(4)):
            next(stream)
        stream.cancel()
        with pytest.raises(RequestCancelled):
            stream.result()
    elif kind == "timeout":
        with pytest.raises(RequestTimeout) as caught:
            vlm.query(None, text, timeout=dice.random() * 0.01, ignore_eos=True, max_tokens=10**6)
        assert f"{text} {WORDS}".startswith(caught.value.partial[: len(text)])
    elif kind == "drop":
        vlm.stream(None, text, timeout=60)
    elif kind == "leave":
        for delta in vlm.stream(None, text, timeout=60):
            assert delta
            break
    else:
        with pytest.raises(PromptError):
            vlm.query(None, "")
    return kind


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_crowd_of_callers_each_gets_what_it_asked_for(seed: int) -> None:
    fake = FakeEngine.factory(echo, step_s=0.0005)
    kinds: Counter[str] = Counter()
    with opened(fake, max_queue=16) as vlm:

        def caller(number: int) -> None:
            dice = random.Random(1000 * seed + number)
            for i in range(REQUESTS):
                kinds[_one(vlm, dice, f"q{number}-{i}")] += 1

        in_threads([lambda n=n: caller(n) for n in range(THREADS)])  # type: ignore[misc]
        eventually(lambda: not fake.engine.running)
        # The loop has heard of every end, so the queue is empty again.
        assert vlm._loop._in_flight == 0
        assert vlm.query(None, "and now").text == f"and now {WORDS}"
    assert sum(kinds.values()) == THREADS * REQUESTS
    assert_each_ended_once(fake.engine)
    assert len(set(fake.engine.added)) == len(fake.engine.added)


@pytest.mark.timeout(120)
def test_an_engine_that_fails_at_any_step_wakes_everybody_and_restarts() -> None:
    for number in range(1, 41):
        error = RuntimeError("broken")
        fake = FakeEngine.factory(echo, max_num_seqs=2, faults=[Fault("step", error, number)])
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
            assert sum(ends.values()) == 9
            # 9 answers of 12 tokens, two at a time: at least 54 steps, so each number is reached.
            assert ends["dead"] > 0
            assert vlm.state == "dead"
            assert vlm.cause is error
            vlm.restart()
            assert fake.engines[0].closed
            assert vlm.state == "ready" and vlm.cause is None
            assert vlm.query(None, "again").text == f"again {WORDS}"
        assert len(fake.engines) == 2
        assert_each_ended_once(fake.engine)


@pytest.mark.timeout(30)
def test_a_dead_engine_does_not_try_again() -> None:
    fake = FakeEngine.factory(faults=[Fault("step", RuntimeError("broken"))])
    with opened(fake) as vlm:
        for _ in range(5):
            with pytest.raises(EngineDeadError):
                vlm.query(None, "q")
        assert fake.calls["step"] == 1
        assert fake.calls["build"] == 1


@pytest.mark.timeout(30)
def test_a_consumer_that_never_reads_holds_its_answer_and_no_more() -> None:
    fake = FakeEngine.factory("word " * 2000)
    with opened(fake) as vlm:
        unread = vlm.stream(None, "q", max_tokens=2000)
        other = vlm.query(None, "q", max_tokens=1)
        assert other.metrics.output_tokens == 1
        eventually(lambda: unread.done)
        waiting = [
            value
            for value in vars(unread._request).values()
            if isinstance(value, list | dict | str) and len(value) > 2000
        ]
        # The text, once; tokens and times are counted by max_tokens.
        assert [type(value) for value in waiting] == [str]
        assert len(unread.text) <= 2000 * len(" word")
        assert "".join(unread) == unread.text


@pytest.mark.timeout(30)
def test_a_slow_consumer_does_not_slow_the_others() -> None:
    fake = FakeEngine.factory(echo)
    with opened(fake) as vlm:
        slow = iter(vlm.stream(None, "slow"))
        first = next(slow)
        assert vlm.query(None, "quick").text == f"quick {WORDS}"
        time.sleep(0.02)
        assert first + "".join(slow) == f"slow {WORDS}"


@pytest.mark.timeout(30)
def test_a_request_that_the_engine_refuses_is_its_own_failure() -> None:
    fake = FakeEngine.factory(echo, faults=[Fault("add", RuntimeError("no"), number=2)])
    with opened(fake) as vlm:
        results = vlm.batch([Request(None, t) for t in "abc"], return_exceptions=True)
        assert str(results[0]) == f"a {WORDS}"
        assert isinstance(results[1], MolmoEdgeError)
        assert isinstance(results[1].__cause__, RuntimeError)
        assert str(results[2]) == f"c {WORDS}"
        assert vlm.state == "ready"
        assert vlm._loop._in_flight == 0


@pytest.mark.timeout(30)
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
        answers: list[str] = []
        waiting = threading.Thread(
            target=lambda: answers.append(vlm.query(None, "d", timeout=20).text)
        )
        waiting.start()
        eventually(lambda: vlm._loop._has_room._wakes)
        step.set()
        waiting.join()
        assert answers == [f"d {WORDS}"]
        assert [s.result().text for s in held] == [f"a {WORDS}", f"b {WORDS}"]
    assert_each_ended_once(fake.engine)


@pytest.mark.timeout(30)
def test_a_batch_longer_than_the_queue_waits_for_room() -> None:
    with opened(FakeEngine.factory(echo), max_queue=3) as vlm:
        results = vlm.batch([Request(None, f"q{i}") for i in range(40)])
        assert [r.text for r in results] == [f"q{i} {WORDS}" for i in range(40)]


@pytest.mark.timeout(30)
def test_waiting_for_room_ends_with_the_engine() -> None:
    step = threading.Event()
    fault = Fault("step", RuntimeError("broken"), 1)
    fake = FakeEngine.factory(echo, holds={"step": step}, faults=[fault])
    ends: list[object] = []
    with opened(fake, max_queue=1) as vlm:

        def caller() -> None:
            ends.extend(vlm.batch([Request(None, t) for t in "abc"], return_exceptions=True))

        thread = threading.Thread(target=caller)
        thread.start()
        eventually(lambda: vlm._loop._has_room._wakes)
        step.set()
        thread.join()
    assert [type(end) for end in ends] == [EngineDeadError] * 3
