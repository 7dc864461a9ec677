"""`Stream`: deltas, ends, and readers that leave early."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, FakeFactory, Fault
from molmo_edge.engine.pending import PendingRequest
from molmo_edge.errors import EngineDeadError, RequestCancelled, RequestTimeout
from molmo_edge.interface import Rendered, Update
from molmo_edge.requests import CheckedOptions
from molmo_edge.stream import Stream
from tests.engine.support import FOREVER, WORDS, assert_all_ended, echo, eventually, in_threads

pytestmark = pytest.mark.timeout(60)


ANSWERS = echo


@pytest.fixture(autouse=True)
def _every_request_ends(vlm: EdgeVLM, fake: FakeFactory) -> Iterator[None]:
    yield
    assert_all_ended(vlm, fake)


def test_deltas_join_to_the_answer(vlm: EdgeVLM) -> None:
    stream = vlm.stream(None, "one two")
    assert stream.prompt_token_ids is not None and len(stream.prompt_token_ids) == 5
    deltas = list(stream)
    assert "".join(deltas) == stream.text == stream.result().text == f"one two {WORDS}"
    assert all(deltas)
    assert list(stream) == []
    half = vlm.stream(None, "hello")
    first = next(half)
    assert half.result().text == f"hello {WORDS}" == first + "".join(half)


@pytest.mark.parametrize("answer", ["Grüße, 世界! 👩‍🚀", "  a\n b "])
def test_characters_are_whole_and_only_the_models_own_space_is_removed(answer: str) -> None:
    with EdgeVLM(engine=FakeEngine.factory(answer, pieces="chars")) as vlm:
        assert "".join(vlm.stream(None, "q")) == answer


def test_text_that_arrives_with_the_end_is_not_lost() -> None:
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
        request = Late("r", Rendered(None), CheckedOptions())
        assert list(Stream(vlm._loop, request)) == ["the end"]


@pytest.mark.parametrize("way", ["break", "context", "cycle", "cancel"])
def test_leaving_early_frees_the_sequence(vlm: EdgeVLM, fake: FakeFactory, way: str) -> None:
    stream = vlm.stream(None, "q", **FOREVER)
    next(stream)
    if way == "break":
        for _ in stream:
            break
        del stream
    elif way == "context":
        with stream:
            next(stream)
    elif way == "cycle":
        cycle: list[object] = [stream]
        cycle.append(cycle)
        del stream, cycle
        gc.collect()
    else:
        in_threads([stream.cancel] * 8)
        for _ in range(2):
            with pytest.raises(RequestCancelled):
                stream.result()
    eventually(lambda: fake.engine.aborted)
    assert fake.engine.aborted == fake.engine.added


def test_a_dropped_stream_aborts_only_itself(vlm: EdgeVLM) -> None:
    streams = [vlm.stream(None, f"q{i}", max_tokens=300) for i in range(8)]
    del streams[::2]
    assert [s.result().text for s in streams] == [f"q{i} {WORDS}" for i in range(1, 8, 2)]


class Robot:
    """Cancels in its finalizer."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.itself = stream, self

    def __del__(self) -> None:
        self.stream.cancel()


def test_finalizers_may_run_at_any_moment_in_any_thread(vlm: EdgeVLM) -> None:
    def caller(name: str) -> None:
        for i in range(5):
            cycle: list[object] = [vlm.stream(None, "dropped", **FOREVER)]
            cycle.append(cycle)
            del cycle
            Robot(vlm.stream(None, "q", **FOREVER))
            assert vlm.query(None, f"{name}{i}").text == f"{name}{i} {WORDS}"

    before = gc.get_threshold()
    gc.set_threshold(1)  # garbage is collected at almost every allocation, in whichever thread
    try:
        in_threads([lambda n=n: caller(n) for n in "abcd"])  # type: ignore[misc]
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


def test_a_deadline_ends_reading_with_the_text_until_then(vlm: EdgeVLM) -> None:
    stream = vlm.stream(None, "q", timeout=0.3, **FOREVER)
    read = []
    with pytest.raises(RequestTimeout) as caught:
        for delta in stream:
            read.append(delta)
    assert caught.value.partial == "".join(read) == stream.text
    assert len(read) > 1
    unread = vlm.stream(None, "q", timeout=0.1, **FOREVER)
    eventually(lambda: unread.done)
    with pytest.raises(RequestTimeout):
        unread.result()


def test_several_threads_may_wait_for_one_answer(vlm: EdgeVLM) -> None:
    stream = vlm.stream(None, "q")
    texts: list[str] = []
    in_threads([lambda: texts.append(stream.result().text)] * 8)
    assert texts == [f"q {WORDS}"] * 8
