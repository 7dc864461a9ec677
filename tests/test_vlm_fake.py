"""`EdgeVLM` over the fake engine: promises that need no model."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from molmo_edge import Choice, EdgeVLM, Request, Result
from molmo_edge.engine.fake import FakeEngine, FakeFactory
from molmo_edge.errors import (
    GenerationError,
    ImageError,
    InputError,
    PromptError,
    RequestTimeout,
    SamplingError,
)
from tests.engine.support import FOREVER, WORDS, assert_all_ended, echo, opened

pytestmark = pytest.mark.timeout(60)
IMAGE = np.zeros((20, 30, 3), np.uint8)
ANSWERS = echo


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
    parts = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what?"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "a mug"},
        {"role": "user", "content": "what colour?"},
    ]
    assert vlm.chat(messages).text == "".join(vlm.chat_stream(messages)) == f"what colour? {WORDS}"
    for wrong in ([], messages[:2], messages[1:], messages[::2], "text", [{"role": "user"}]):
        with pytest.raises(PromptError):
            vlm.chat(wrong)  # type: ignore[arg-type]
    assert len(fake.engine.added) == 2


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda vlm: vlm.query(None, " \n"), PromptError),
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


def test_a_batch_keeps_order_and_raises_or_returns_errors(vlm: EdgeVLM) -> None:
    requests = [Request(None, "a"), Request(None, ""), Request(None, "c", max_tokens=-1)]
    results = vlm.batch(requests, return_exceptions=True)
    assert [type(r) for r in results] == [Result, PromptError, SamplingError]
    with pytest.raises(PromptError):
        vlm.batch(requests)
    assert vlm.batch([]) == []
    mixed: list[Any] = [(None, "a"), {"image": None, "text": "a"}, None, Request(None, "d")]
    for results in (
        vlm.batch(mixed, return_exceptions=True),
        asyncio.run(vlm.abatch(mixed, return_exceptions=True)),
    ):
        assert [type(r) for r in results] == [PromptError] * 3 + [Result]
    for wrong in (None, mixed[-1]):
        with pytest.raises(PromptError):
            vlm.batch(wrong)


def test_numpy_scalars_are_numbers_in_every_call(vlm: EdgeVLM) -> None:
    options: Any = {
        "max_tokens": np.int64(2), "temperature": np.float32(0.5), "top_p": np.float64(0.5),
        "ignore_eos": np.bool_(True), "timeout": np.float32(30), "logprobs": np.int32(2),
    }  # fmt: skip
    assert vlm.query(None, "q", **options).metrics.output_tokens == 2
    [seen] = vlm.watch([IMAGE], "q", max_fps=np.float32(9), frame_timeout=np.int64(9))
    assert seen.result is not None
    scored = vlm.score(None, "q", np.array([1, 2]), candidates=np.array([[3], [4]]))
    assert scored.token_ids == (1, 2) and [set(one) for one in scored.candidates] == [{3}, {4}]
    with pytest.raises(SamplingError, match="max_tokens should be a valid integer"):
        vlm.query(None, "q", max_tokens=np.float32(2))
    with pytest.raises(SamplingError, match=r"max_model_len\. It is a setting"):
        vlm.query(None, "q", max_model_len=64)  # type: ignore[call-arg]


def test_a_batch_can_yield_answers_as_they_finish_and_be_left_early(
    vlm: EdgeVLM, fake: FakeFactory
) -> None:
    def requests() -> Iterator[Request]:
        yield Request(None, "long", **FOREVER)
        yield Request(None, "late", timeout=0.05, **FOREVER)
        yield Request(None, "")
        for number in range(100):
            yield Request(None, f"q{number}")
            taken.append(number)

    taken: list[int] = []
    with closing(vlm.iter_batch(requests())) as answers:
        seen = dict(itertools.islice(answers, 12))
    assert 0 not in seen and isinstance(seen[2], PromptError)
    if 1 in seen:
        assert isinstance(seen[1], RequestTimeout)
    assert {str(one) for i, one in seen.items() if i > 2} < {f"q{n} {WORDS}" for n in range(100)}
    assert len(taken) < 40  # taken as there is room
    assert_all_ended(vlm, fake)
    failing = (Request(None, "q", **FOREVER) if n < 3 else 1 / 0 for n in itertools.count())
    with pytest.raises(ZeroDivisionError):
        vlm.batch(failing)  # type: ignore[arg-type]
    assert_all_ended(vlm, fake)
    late = Request(None, "late", timeout=0.05, **FOREVER)
    assert [type(one) for _, one in vlm.iter_batch([late])] == [RequestTimeout]


@pytest.mark.parametrize("where", ["queue", "prefill", "decode", "render"])
def test_a_deadline_covers_the_whole_request(where: str) -> None:
    hold = threading.Event()
    call = {"render": "render", "decode": "nothing"}.get(where, "step")
    fake = FakeEngine.factory(echo, holds={call: hold}, step_s=0.005)
    with opened(fake) as vlm:
        first = vlm.stream(None, "first") if where == "queue" else None
        if first is not None:
            fake.wait_for("step")
        if where == "render":
            threading.Timer(1.0, hold.set).start()
        with pytest.raises(RequestTimeout) as caught:
            vlm.query(None, "q", timeout=0.3, **FOREVER)
        assert caught.value.partial.startswith("q one") == (where == "decode")
        hold.set()
        assert fake.engine.added == [] or where != "render"  # too late already
        assert_all_ended(vlm, fake)


def test_a_request_that_the_engine_aborts_is_a_generation_error() -> None:
    class Aborting(FakeEngine):
        def step(self) -> Any:
            return [u._replace(finish_reason=u.finish_reason and "error") for u in super().step()]

    with EdgeVLM(engine=lambda: Aborting(FakeFactory("one two"))) as vlm:
        with pytest.raises(GenerationError) as caught:
            vlm.query(None, "q")
        assert caught.value.partial == "one two"
        assert vlm.state == "ready"


def test_scores_are_of_each_token_after_those_before_it(vlm: EdgeVLM, fake: FakeFactory) -> None:
    score = vlm.score(None, "q", [5, 6, 7], candidates=[[1], [], [2, 3]])
    assert score.token_ids == (5, 6, 7)
    assert [set(c) for c in score.candidates] == [{1}, set(), {2, 3}]
    assert all(logprob < 0 for logprob in score.logprobs)
    assert len(score.greedy_token_ids) == 3
    assert len(fake.engine.added) == 3
    answers: list[Any] = [[], [1, -1], ["a"], [True], None, np.array(5), [1] * 4096]
    others: list[Any] = [[[1], [2]], [["a"]], [[1.5]], [None], 5, np.array(5), [np.array(5)]]
    for answer, candidates in [*((one, None) for one in answers), *(([1], one) for one in others)]:
        with pytest.raises(PromptError):
            vlm.score(None, "q", answer, candidates=candidates)
    # Images are rendered once, and nothing is asked before it is known to fit.
    assert len(fake.engine.added) == 3 and fake.calls["render"] == 2


def test_a_choice_takes_one_request_for_each_beginning(vlm: EdgeVLM, fake: FakeFactory) -> None:
    choice = vlm.choose(IMAGE, "q", ["yes", "no", "unsure"])
    assert len(fake.engine.added) == choice.metrics.output_tokens == 1
    assert choice.metrics.prompt_tokens == 144 + 4 and choice.environment is not None
    assert list(choice.probabilities) == ["yes", "no", "unsure"]
    assert vlm.choose(None, "q", ["the cup", "the mug", "a mug"]).metrics.output_tokens == 3
    messages = [{"role": "user", "content": "q"}]
    assert vlm.choose(None, messages, [f"q {WORDS}", "q one", " no\n"]).choice == "q one"
    assert fake.calls["render"] == 3


def test_choices_are_answered_in_batches_and_by_asyncio(vlm: EdgeVLM, fake: FakeFactory) -> None:
    requests: list[Any] = [
        Request.choose(IMAGE, "q", ["q two", "q one", "q three"]),
        Request(None, "q"),
        Request.choose(None, "q", ["yes"]),
        Request.choose(None, [{"role": "user", "content": "q"}], ["no", "q one"]),
    ]

    async def asynchronously() -> tuple[Choice, list[Any]]:
        batch = await vlm.abatch(requests, return_exceptions=True)
        return await vlm.achoose(IMAGE, "q", ["q two", "q one", "q three"]), batch

    batch = vlm.batch(requests, return_exceptions=True)
    alone, other = asyncio.run(asynchronously())
    for answers in (batch, other):
        assert [type(one) for one in answers] == [Choice, Result, PromptError, Choice]
        assert str(answers[0]) == str(answers[3]) == "q one"
        assert answers[0].probabilities == alone.probabilities
    assert_all_ended(vlm, fake)


@pytest.mark.parametrize(
    ("choices", "options", "error", "message"),
    [
        ([], {}, PromptError, "2 to 100 choices, not 0"),
        (["yes"], {}, PromptError, "2 to 100"),
        ([f"number {i}" for i in range(1000)], {}, PromptError, "not 1000"),
        (["yes", " yes "], {}, PromptError, "equal"),
        (["yes", "\u200d"], {}, PromptError, "empty"),
        (["yes", " "], {}, PromptError, "empty"),
        (["yes", "n\no"], {}, PromptError, "control"),
        (["yes", "\ud800"], {}, PromptError, "surrogates"),
        (["yes", "<|endoftext|>"], {}, PromptError, "special tokens"),
        (["yes", 5], {}, PromptError, "strings"),
        ("yes", {}, PromptError, "list of strings"),
        (None, {}, PromptError, "list of strings"),
        (["yes", "no " * 5000], {}, PromptError, "at most 1000 together"),
        (["yes", "no"], {"temperature": 0.5}, SamplingError, "generates nothing"),
        (["yes", "no"], {"json_schema": {"type": "string"}}, SamplingError, "generates nothing"),
        (["yes", "no"], {"max_tokens": 5}, SamplingError, "generates nothing"),
        (["yes", "no"], {"timeuot": 5}, SamplingError, "timeout"),
        (["yes", "no"], {"timeout": -1}, SamplingError, "timeout"),
    ],
)
def test_bad_choices_are_refused_and_the_next_call_works(
    vlm: EdgeVLM, fake: FakeFactory, choices: Any, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        vlm.choose(None, "q", choices, **options)
    assert fake.engine.added == []
    assert str(vlm.choose(None, "q", ["no", "q one"])) == "q one"
    with pytest.raises(PromptError, match="in its messages"):
        vlm.choose(IMAGE, [{"role": "user", "content": "q"}], ["yes", "no"])


def test_a_choice_ends_at_its_deadline_and_when_its_task_is_cancelled() -> None:
    hold = threading.Event()
    fake = FakeEngine.factory(echo, holds={"step": hold})
    with opened(fake) as vlm:
        with pytest.raises(RequestTimeout):
            vlm.choose(None, "q", ["q one", "q two"], timeout=0.2)

        async def cancelled() -> None:
            task = asyncio.create_task(vlm.achoose(None, "q", ["q one", "q two"]))
            await asyncio.to_thread(fake.wait_for, "step")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancelled())
        hold.set()
        assert_all_ended(vlm, fake)
        assert str(vlm.choose(None, "q", ["q one", "q two"])) == "q one"


def test_probabilities_are_normalised_and_what_continues_a_choice_is_part_of_it() -> None:
    answers = {"red": [1], "red cup": [1, 2], "blue": [3]}
    scores = {(): {1: math.log(0.5), 3: math.log(0.3)}, (1,): {2: math.log(0.4)}}
    results = [Result("", "length", (1,))] * 2
    choice = Choice.of(answers, scores, results)
    assert choice.probabilities == pytest.approx({"red": 0.5, "red cup": 0.2, "blue": 0.3})
    assert choice.outside == pytest.approx(0.2) and choice.choice == "red"
    # Answers less probable than the smallest float.
    far = {(): {1: -2000.0, 3: -2001.0}, (1,): {2: -1.0}}
    assert Choice.of(answers, far, results).probabilities["red"] == pytest.approx(
        1 / (1 + 2 / math.e)
    )
