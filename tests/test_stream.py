"""`Stream`: deltas, ends, and what happens to those who leave."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, FakeFactory, Fault
from molmo_edge.engine.pending import PendingRequest
from molmo_edge.errors import EngineDeadError, RequestCancelled, RequestTimeout
from molmo_edge.interface import Rendered, Update
from molmo_edge.requests import CheckedOptions
from molmo_edge.sampling import Sampling
from molmo_edge.stream import Stream
from tests.engine.support import (
    FOREVER,
    WORDS,
    assert_each_ended_once,
    echo,
    eventually,
    in_threads,
)

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def fake() -> FakeFactory:
    return FakeEngine.factory(echo, step_s=0.0005)


@pytest.fixture
def vlm(fake: FakeFactory) -> Iterator[EdgeVLM]:
    with EdgeVLM(engine=fake) as vlm:
        yield vlm
        eventually(lambda: not fake.engine.running)
        assert_each_ended_once(fake.engine)


def test_deltas_join_to_the_answer(vlm: EdgeVLM) -> None:
    stream = vlm.stream(None, "hello")
    deltas = list(stream)
    assert "".join(deltas) == stream.text == stream.result().text == f"hello {WORDS}"
    assert all(deltas)
    assert list(stream) == []


def test_characters_come_whole(vlm: EdgeVLM) -> None:
    fake = FakeEngine.factory("Grüße, 世界! 👩‍🚀", pieces="chars")
    with EdgeVLM(engine=fake) as other:
        deltas = list(other.stream(None, "q"))
    assert "".join(deltas) == "Grüße, 世界! 👩‍🚀"
    assert all(delta.encode() for delta in deltas)


def test_the_answers_leading_space_is_left_out_and_no_other(vlm: EdgeVLM) -> None:
    with EdgeVLM(engine=FakeEngine.factory("  a\n b ", pieces="chars")) as other:
        assert "".join(other.stream(None, "q")) == "  a\n b "


def test_the_result_is_there_after_iterating_halfway(vlm: EdgeVLM) -> None:
    stream = vlm.stream(None, "hello")
    first = next(stream)
    assert stream.result().text == f"hello {WORDS}"
    assert first + "".join(stream) == f"hello {WORDS}"


def test_text_that_came_with_the_end_is_not_lost() -> None:
    """The last words may arrive between a reader's two looks at the request."""

    class Late(PendingRequest):
        reads = 0

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "text":
                self.reads += 1
                if self.reads == 1:
                    self.feed(Update(self.request_id, "the end", (1,), finish_reason="stop"), 0.0)
            return value

    with EdgeVLM(engine=FakeEngine.factory()) as vlm:
        request = Late("r", Rendered(None), Sampling(), started=0.0)
        assert list(Stream(vlm._loop, request, CheckedOptions(Sampling()))) == ["the end"]


@pytest.mark.parametrize("way", ["break", "context", "drop", "cycle", "cancel", "error"])
def test_who_leaves_early_frees_the_sequence(vlm: EdgeVLM, fake: FakeFactory, way: str) -> None:
    stream = vlm.stream(None, "q", **FOREVER)
    next(stream)
    if way == "break":
        for _ in stream:
            break
        del stream
    elif way == "context":
        with stream:
            next(stream)
    elif way == "drop":
        del stream
    elif way == "cycle":
        holder: list[object] = [stream]
        holder.append(holder)
        del stream, holder
        gc.collect()
    elif way == "cancel":
        stream.cancel()
        stream.cancel()
    else:
        with pytest.raises(ZeroDivisionError):
            _reads_and_fails(stream)
        del stream
    eventually(lambda: fake.engine.aborted)
    assert fake.engine.aborted == fake.engine.added
    assert vlm.query(None, "next").text == f"next {WORDS}"


def _reads_and_fails(stream: Stream) -> None:
    for _ in stream:
        raise ZeroDivisionError


def test_a_stream_dropped_while_others_run_aborts_only_itself(
    vlm: EdgeVLM, fake: FakeFactory
) -> None:
    streams = [vlm.stream(None, f"q{i}", max_tokens=300) for i in range(8)]
    del streams[::2]
    gc.collect()
    assert [s.result().text for s in streams] == [f"q{i} {WORDS}" for i in range(1, 8, 2)]


def test_finalizers_may_run_in_the_middle_of_anything(vlm: EdgeVLM, fake: FakeFactory) -> None:
    """Streams die in reference cycles, so the collector runs in whatever thread allocates."""
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:

        def caller(name: str) -> None:
            for i in range(5):
                cycle: list[object] = [vlm.stream(None, "dropped", **FOREVER)]
                cycle.append(cycle)
                del cycle
                assert vlm.query(None, f"{name}{i}").text == f"{name}{i} {WORDS}"

        in_threads([lambda n=n: caller(n) for n in "abcd"])  # type: ignore[misc]
    finally:
        gc.set_threshold(*before)
    gc.collect()


def test_an_object_that_cancels_in_its_finalizer_does_no_harm(
    vlm: EdgeVLM, fake: FakeFactory
) -> None:
    class Robot:
        def __init__(self, stream: Stream) -> None:
            self.stream, self.itself = stream, self

        def __del__(self) -> None:
            self.stream.cancel()

    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(30):
            Robot(vlm.stream(None, "q", **FOREVER))
            assert vlm.query(None, "next").text == f"next {WORDS}"
    finally:
        gc.set_threshold(*before)
    gc.collect()


def test_the_text_comes_first_and_then_the_error() -> None:
    fake = FakeEngine.factory(echo, faults=[Fault("step", RuntimeError("broken"), 5)])
    with EdgeVLM(engine=fake) as vlm:
        stream = vlm.stream(None, "q")
        eventually(lambda: stream.done)
        deltas = []
        with pytest.raises(EngineDeadError):
            for delta in stream:
                deltas.append(delta)
        assert "".join(deltas) == stream.text == "q one two three"
        with pytest.raises(EngineDeadError):
            next(stream)


def test_a_deadline_ends_reading_with_what_was_generated(vlm: EdgeVLM) -> None:
    stream = vlm.stream(None, "q", timeout=0.1, **FOREVER)
    read = []
    with pytest.raises(RequestTimeout) as caught:
        for delta in stream:
            read.append(delta)
    assert caught.value.partial == "".join(read) == stream.text
    assert len(read) > 1
    # Asking again says the same.
    with pytest.raises(RequestTimeout):
        stream.result()


def test_a_deadline_passes_without_anybody_reading(vlm: EdgeVLM, fake: FakeFactory) -> None:
    stream = vlm.stream(None, "q", timeout=0.02, **FOREVER)
    eventually(lambda: fake.engine.aborted)
    assert stream.done
    with pytest.raises(RequestTimeout):
        stream.result()


def test_errors_are_raised_afresh_so_that_they_hold_no_callers() -> None:
    with EdgeVLM(engine=FakeEngine.factory(step_s=0.001)) as vlm:
        stream = vlm.stream(None, "q", **FOREVER)
        stream.cancel()
        caught = []
        for _ in range(2):
            try:
                stream.result()
            except RequestCancelled as exc:
                caught.append(exc)
        assert caught[0] is not caught[1]
        assert stream._request._error is not None
        assert stream._request._error.__traceback__ is None


def test_two_threads_may_wait_for_one_answer(vlm: EdgeVLM) -> None:
    stream = vlm.stream(None, "q")
    texts: list[str] = []
    in_threads([lambda: texts.append(stream.result().text)] * 8)
    assert texts == [f"q {WORDS}"] * 8


def test_cancelling_from_another_thread_wakes_the_reader(vlm: EdgeVLM) -> None:
    stream = vlm.stream(None, "q", **FOREVER)
    thread = threading.Timer(0.02, stream.cancel)
    thread.start()
    with pytest.raises(RequestCancelled):
        for _ in stream:
            pass
    thread.join()


def test_the_prompts_tokens_are_known(vlm: EdgeVLM) -> None:
    ids = vlm.stream(None, "one two").prompt_token_ids
    assert ids is not None and len(ids) == 5
