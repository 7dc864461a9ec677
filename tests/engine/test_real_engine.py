"""The real engine in float32 on made-up weights: requests do not hear of each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from molmo_edge import EdgeVLM, Result
from molmo_edge.errors import InputError, RequestCancelled
from tests.engine.support import in_threads

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

_dice = np.random.default_rng(11)
PICTURES = [_dice.integers(0, 256, (50, 70, 3), dtype=np.uint8) for _ in range(2)]
ASKED: list[tuple[np.ndarray[Any, Any] | None, str, dict[str, Any]]] = [
    (None, "Count to ten.", {}),
    (None, "Name three colours.", {}),
    (None, "A much longer question, " * 12, {}),
    (None, "x", {}),
    (None, "Grüße an 世界", {}),
    (None, "Sampled, with a seed of its own.", {"temperature": 1.0, "seed": 5}),
    (PICTURES[0], "What is this?", {"max_crops": 1}),
    (PICTURES[1], "Describe this image.", {"max_crops": 1}),
]


@pytest.fixture(scope="module")
def random_vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeVLM]:
    """Random weights: any mix-up of caches or positions changes the tokens."""
    from molmo_edge.models.molmo.synthetic import write_checkpoint

    folder = write_checkpoint(tmp_path_factory.mktemp("random") / "molmo", seed=3)
    with EdgeVLM(
        str(folder),
        cache_dir=tmp_path_factory.mktemp("cache"),
        dtype="float32",
        kv_cache_dtype="auto",
        max_model_len=1024,
        max_num_seqs=8,
        kv_cache_memory_gb=0.25,
        enforce_eager=True,
    ) as vlm:
        yield vlm


def ask(vlm: EdgeVLM, i: int) -> Result:
    image, text, options = ASKED[i]
    return vlm.query(image, text, max_tokens=24, ignore_eos=True, logprobs=1, **options)


@pytest.fixture(scope="module")
def alone(random_vlm: EdgeVLM) -> list[Result]:
    """Each request with the engine to itself."""
    return [ask(random_vlm, i) for i in range(len(ASKED))]


def assert_same(results: list[Result], alone: list[Result]) -> None:
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]
    assert [r.text for r in results] == [r.text for r in alone]
    for result, other in zip(results, alone, strict=True):
        assert result.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_eight_streams_at_once_equal_the_same_eight_alone(
    random_vlm: EdgeVLM, alone: list[Result]
) -> None:
    # The answers differ, or the comparison would show nothing.
    assert len({r.token_ids for r in alone}) == len(ASKED)
    together: dict[int, Result] = {}
    start = threading.Barrier(len(ASKED))

    def caller(i: int) -> None:
        image, text, options = ASKED[i]
        start.wait()
        stream = random_vlm.stream(
            image, text, max_tokens=24, ignore_eos=True, logprobs=1, **options
        )
        deltas = list(stream)
        together[i] = stream.result()
        assert "".join(deltas) == together[i].text

    in_threads([lambda i=i: caller(i) for i in range(len(ASKED))])  # type: ignore[misc]
    assert_same([together[i] for i in range(len(ASKED))], alone)


def test_a_stream_cancelled_in_the_middle_leaves_the_next_answers_right(
    random_vlm: EdgeVLM, alone: list[Result]
) -> None:
    for i in range(len(ASKED)):
        stream = random_vlm.stream(None, f"noise {i}", ignore_eos=True, max_tokens=900)
        for _ in range(3):
            next(stream)
        stream.cancel()
        with pytest.raises(RequestCancelled):
            stream.result()
        assert_same([ask(random_vlm, i)], [alone[i]])


def test_neighbours_that_fail_or_leave_are_not_noticed(
    random_vlm: EdgeVLM, alone: list[Result]
) -> None:
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            for bad in (b"no picture", None):
                with pytest.raises(InputError):
                    random_vlm.query(bad, "" if bad is None else "q")
            for _ in random_vlm.stream(None, "noise", ignore_eos=True, max_tokens=900):
                break

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert_same([ask(random_vlm, i) for i in range(len(ASKED))], alone)
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("ending", ["length", "stop", "top logprobs"])
def test_answers_are_what_vllm_itself_makes_of_the_same_prompt(
    random_vlm: EdgeVLM, alone: list[Result], ending: str
) -> None:
    """We read a request's progress from vLLM's state of it; vLLM's own output is the measure."""
    stop = alone[0].text.split()[2] if ending == "stop" else None
    count = 3 if ending == "top logprobs" else 1
    options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "logprobs": count}
    stream = random_vlm.stream(
        None, ASKED[0][1], **options, **({} if stop is None else {"stop": [stop]})
    )
    ours = stream.result()
    prompt = {"prompt_token_ids": list(stream.prompt_token_ids or ())}

    def bare(engine: Any) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, stop=stop, **options)
        return engine.llm.generate(prompt, params, use_tqdm=False)[0]

    theirs = random_vlm.in_engine_thread(bare)
    one = theirs.outputs[0]
    assert ours.token_ids == tuple(one.token_ids)
    assert ours.text == one.text.lstrip()
    assert ours.finish_reason == one.finish_reason == ("stop" if stop else "length")
    assert ours.metrics.cached_tokens is not None
    pairs = zip(one.token_ids, one.logprobs, strict=True)
    chosen = [entry[token].logprob for token, entry in pairs]
    assert ours.logprobs == pytest.approx(chosen, abs=1e-4)
    if count > 1:
        assert ours.top_logprobs is not None
        assert [set(entry) for entry in ours.top_logprobs] == [set(e) for e in one.logprobs]
