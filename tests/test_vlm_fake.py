"""`EdgeVLM` over the fake engine: promises that need no model."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from molmo_edge import EdgeVLM, Request, Result
from molmo_edge.engine.fake import FakeEngine, FakeFactory, Fault
from molmo_edge.errors import (
    EngineClosedError,
    EngineDeadError,
    GenerationError,
    ImageError,
    InputError,
    PromptError,
    RequestTimeout,
    SamplingError,
)
from tests.engine.support import FOREVER, WORDS, assert_each_ended_once, echo, eventually, opened

pytestmark = pytest.mark.timeout(60)
IMAGE = np.zeros((20, 30, 3), np.uint8)


@pytest.fixture
def fake() -> FakeFactory:
    return FakeEngine.factory(echo, step_s=0.0005)


@pytest.fixture
def vlm(fake: FakeFactory) -> Iterator[EdgeVLM]:
    with opened(fake) as vlm:
        yield vlm


def test_a_query_returns_text_tokens_and_metrics(vlm: EdgeVLM) -> None:
    result = vlm.query(IMAGE, "q")
    assert str(result) == result.text == f"q {WORDS}"
    assert result.finish_reason == "stop"
    metrics = result.metrics
    assert metrics.output_tokens == len(result.token_ids) == 12
    assert len(metrics.itl_s) == 11
    assert metrics.prompt_tokens == 144 + 4 and metrics.image_tokens == 144
    assert metrics.queue_s is not None and metrics.preprocess_s is not None
    assert metrics.ttft_s is not None and metrics.e2e_s is not None
    assert 0 <= metrics.queue_s <= metrics.ttft_s <= metrics.e2e_s
    assert metrics.e2e_s == pytest.approx(metrics.ttft_s + sum(metrics.itl_s))
    assert result.environment is not None and result.environment["model"] == "fake"


def test_a_conversation_is_checked_and_answered(vlm: EdgeVLM, fake: FakeFactory) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": IMAGE},
                                     {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a mug"},
        {"role": "user", "content": "what colour?"},
    ]
    assert vlm.chat(messages).text == "".join(vlm.chat_stream(messages)) == f"what colour? {WORDS}"
    for wrong in ([], messages[:2], [messages[1]], "text", [{"role": "user"}]):
        with pytest.raises(PromptError):
            vlm.chat(wrong)  # type: ignore[arg-type]
    assert len(fake.engine.added) == 2


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda vlm: vlm.query(None, ""), PromptError),
        (lambda vlm: vlm.query(None, 5), PromptError),
        (lambda vlm: vlm.query(None, "a" + "<|endoftext|>"), PromptError),
        (lambda vlm: vlm.query(None, "\ud800"), PromptError),
        (lambda vlm: vlm.query(b"no image", "q"), ImageError),
        (lambda vlm: vlm.query(None, "q", max_tokens=0), SamplingError),
        (lambda vlm: vlm.query(None, "q", timeout=0), SamplingError),
        (lambda vlm: vlm.query(None, "q", temprature=1), SamplingError),
    ],
)
def test_bad_input_is_refused_before_the_engine_and_the_next_call_works(
    vlm: EdgeVLM, fake: FakeFactory, call: Any, kind: type[InputError]
) -> None:
    with pytest.raises(kind):
        call(vlm)
    assert fake.engine.added == []
    assert vlm.query(None, "next").text == f"next {WORDS}"


def test_a_batch_keeps_order_and_raises_or_returns_errors(
    vlm: EdgeVLM, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [Request(None, "a"), Request(None, ""), Request(None, "c", max_tokens=-1)]
    results = vlm.batch(requests, return_exceptions=True)
    assert [type(r) for r in results] == [Result, PromptError, SamplingError]
    with pytest.raises(PromptError):
        vlm.batch(requests)
    assert vlm.batch([]) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vlm.batch([Request(None, "q")] * 3, progress=True)
    assert "Answering" in capsys.readouterr().out


def test_a_batch_is_decoded_together() -> None:
    fake = FakeEngine.factory(echo, max_num_seqs=4)
    with opened(fake) as vlm:
        vlm.batch([Request(None, f"q{i}") for i in range(4)])
    # One at a time, 48 tokens would be 48 steps; requests join as they are rendered.
    assert fake.calls["step"] < 40


@pytest.mark.parametrize("where", ["queue", "prefill", "decode", "render"])
def test_a_deadline_covers_the_whole_request(where: str) -> None:
    slow: dict[str, dict[str, Any]] = {
        "queue": {"holds": {"step": threading.Event()}},
        "prefill": {"prefill_s": 0.6},
        "decode": {"step_s": 0.005},
        "render": {"render_s": 0.4},
    }
    fake = FakeEngine.factory(echo, **slow[where])
    with opened(fake) as vlm:
        first = vlm.stream(None, "first") if where == "queue" else None
        if first is not None:
            fake.wait_for("step")
        with pytest.raises(RequestTimeout) as caught:
            vlm.query(None, "q", timeout=0.3, **FOREVER)
        assert caught.value.partial.startswith("q one") == (where == "decode")
        for hold in fake.holds.values():
            hold.set()
        eventually(lambda: vlm._loop._in_flight == 0)
    if where == "render":  # too late already: nothing reaches the engine
        assert fake.engine.added == []
    assert_each_ended_once(fake.engine)


def test_an_endless_timeout_is_none(vlm: EdgeVLM) -> None:
    for timeout in (None, float("inf"), 1e300, 1e9):
        assert vlm.query(None, "q", timeout=timeout).text == f"q {WORDS}"


def test_a_request_that_the_engine_aborts_is_a_generation_error() -> None:
    class Aborting(FakeEngine):
        def step(self) -> Any:
            return [u._replace(finish_reason=u.finish_reason and "error") for u in super().step()]

    with EdgeVLM(engine=lambda: Aborting("one two")) as vlm:
        with pytest.raises(GenerationError) as caught:
            vlm.query(None, "q")
        assert caught.value.partial == "one two"
        assert vlm.state == "ready"


def test_state_and_cause_are_public(vlm: EdgeVLM) -> None:
    assert (vlm.state, vlm.cause) == ("ready", None)
    vlm.close()
    assert (vlm.state, vlm.cause) == ("closed", None)
    for error, advice in [(RuntimeError("broken"), "restart"), (MemoryError(), "max_num_seqs")]:
        with opened(FakeEngine.factory(faults=[Fault("step", error)])) as other:
            for _ in range(2):
                with pytest.raises(EngineDeadError, match=type(error).__name__) as caught:
                    other.query(None, "q")
                assert caught.value.__cause__ is other.cause is error
                assert advice in str(caught.value)
            assert other.state == "dead"


def test_the_context_manager_closes_also_on_errors(fake: FakeFactory) -> None:
    with pytest.raises(ZeroDivisionError), EdgeVLM(engine=fake) as vlm:
        raise ZeroDivisionError
    assert fake.engine.closed
    with pytest.raises(EngineClosedError):
        vlm.query(None, "q")


def test_scores_are_of_each_token_after_those_before_it(vlm: EdgeVLM, fake: FakeFactory) -> None:
    score = vlm.score(None, "q", [5, 6, 7], candidates=[[1], [], [2, 3]])
    assert score.token_ids == (5, 6, 7)
    assert [set(c) for c in score.candidates] == [{1}, set(), {2, 3}]
    assert all(logprob < 0 for logprob in score.logprobs)
    # The model's own choice at each position, whatever the answer has.
    assert len(score.greedy_token_ids) == 3
    assert set(score.greedy_token_ids).isdisjoint(score.token_ids)
    assert len(fake.engine.added) == 3
    for answer, candidates in [([], None), ([1, -1], None), (["a"], None), ([1], [[1], [2]])]:
        with pytest.raises(PromptError):
            vlm.score(None, "q", answer, candidates=candidates)  # type: ignore[arg-type]
