"""Random weights in float32: any mix-up of requests, caches or drafts changes the tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from molmo_edge import Choice, EdgeVLM, Result, Score
from molmo_edge.errors import InputError, RequestCancelled, SamplingError
from molmo_edge.models.molmo2.synthetic import write_checkpoint
from molmo_edge.stream import Stream
from tests.engine.support import in_threads

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

_dice = np.random.default_rng(11)
IMAGES = [_dice.integers(0, 256, (50, 70, 3), dtype=np.uint8) for _ in range(2)]
REQUESTS: list[tuple[np.ndarray[Any, Any] | None, str, dict[str, Any]]] = [
    (None, "Count to ten.", {}),
    # A prompt that repeats itself feeds the drafts, as do the loops of random weights.
    (None, "point to the red mug on the table, " * 20, {}),
    (None, "Grüße an 世界", {}),
    (None, "Sampled, with a seed of its own.", {"temperature": 1.0, "seed": 5}),
    (IMAGES[0], "What is this?", {"max_crops": 1}),
    (IMAGES[1], "How many red mugs are there? " * 4, {"max_crops": 1}),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model": str(write_checkpoint(tmp_path_factory.mktemp("random") / "molmo2", seed=3)),
        "cache_dir": tmp_path_factory.mktemp("cache"),
        "engine": "process",
        "dtype": "float32",
        "max_model_len": 2048,
        "kv_cache_memory_gb": 0.25,
        "enforce_eager": True,
    }


@pytest.fixture(scope="module")
def random_vlm(settings: dict[str, Any]) -> Iterator[EdgeVLM]:
    with EdgeVLM(**settings, max_num_seqs=8) as vlm:
        yield vlm


def ask(vlm: EdgeVLM, i: int) -> Stream:
    image, text, options = REQUESTS[i]
    return vlm.stream(image, text, max_tokens=48, ignore_eos=True, logprobs=1, **options)


def score_tokens(vlm: EdgeVLM) -> tuple[Choice, Score]:
    choices, candidates = ["red mug", "red cup", "blue"], [[7], []]
    choice = vlm.choose(IMAGES[0], "Which?", choices, max_crops=1)
    return choice, vlm.score(None, "q", [5, 6], candidates=candidates)


@pytest.fixture(scope="module")
def alone(random_vlm: EdgeVLM) -> list[Result]:
    """Each request with the engine to itself."""
    results = [ask(random_vlm, i).result() for i in range(len(REQUESTS))]
    # The answers differ, or the comparison would show nothing.
    assert len({r.token_ids for r in results}) == len(REQUESTS)
    return results


def test_requests_at_once_equal_the_same_alone_whatever_their_neighbours_do(
    random_vlm: EdgeVLM, alone: list[Result]
) -> None:
    start = threading.Barrier(len(REQUESTS) + 1)

    def caller(i: int) -> None:
        start.wait()
        stream = ask(random_vlm, i)
        deltas = list(stream)
        result = stream.result()
        assert "".join(deltas) == result.text == alone[i].text
        assert result.token_ids == alone[i].token_ids
        assert result.logprobs == pytest.approx(alone[i].logprobs, abs=1e-3)

    def disturb() -> None:
        start.wait()
        for _ in range(20):
            with pytest.raises(InputError):
                random_vlm.query(b"no image", "q")
            stream = random_vlm.stream(None, "noise", ignore_eos=True, max_tokens=900)
            next(stream)
            stream.cancel()
            with pytest.raises(RequestCancelled):
                stream.result()

    in_threads([disturb, *(lambda i=i: caller(i) for i in range(len(REQUESTS)))])  # type: ignore[misc]


def test_drafts_and_a_cached_prefix_change_no_token(
    settings: dict[str, Any], random_vlm: EdgeVLM, alone: list[Result]
) -> None:
    with EdgeVLM(
        **settings,
        max_num_seqs=2,
        speculation="ngram",
        enable_prefix_caching=True,
        engine_args={"disable_log_stats": False},
    ) as vlm:
        for again in range(2):
            for i in (1, len(REQUESTS) - 1):
                image, text, options = REQUESTS[i]
                result = vlm.query(image, text, max_tokens=48, ignore_eos=True, **options)
                assert result.token_ids == alone[i].token_ids
                assert bool(result.metrics.cached_tokens) == bool(again)
        with pytest.raises(SamplingError, match="cannot sample while tokens are drafted"):
            vlm.query(None, "x", temperature=0.5)
        # Scored beside another request's drafts.
        with vlm.stream(*REQUESTS[1][:2], ignore_eos=True, max_tokens=1000, logprobs=1) as drafting:
            next(drafting)
            choice, score = score_tokens(vlm)
            assert not drafting.done
        choice_alone, score_alone = score_tokens(random_vlm)
        assert choice.probabilities == pytest.approx(choice_alone.probabilities, abs=1e-3)
        assert choice.outside == pytest.approx(choice_alone.outside, abs=1e-3)
        assert score.logprobs == pytest.approx(score_alone.logprobs, abs=1e-3)
        assert score.candidates[0] == pytest.approx(score_alone.candidates[0], abs=1e-3)
        assert score.greedy_token_ids == score_alone.greedy_token_ids

        def drafted(engine: Any) -> tuple[float, float]:
            from vllm.v1.metrics.reader import get_metrics_snapshot

            values = {m.name: getattr(m, "value", 0) for m in get_metrics_snapshot()}
            prefix = "vllm:spec_decode_num_"
            return values[f"{prefix}draft_tokens"], values[f"{prefix}accepted_tokens"]

        tokens, accepted = vlm.in_engine_thread(drafted)
    assert 0 < accepted <= tokens
