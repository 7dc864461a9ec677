"""Random weights in float32: any mix-up of requests, caches or drafts changes the tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molmo_edge import EdgeVLM, Result
from molmo_edge.errors import InputError, RequestCancelled
from molmo_edge.models.molmo.synthetic import write_checkpoint
from tests.engine.support import in_threads

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

_dice = np.random.default_rng(11)
IMAGES = [_dice.integers(0, 256, (50, 70, 3), dtype=np.uint8) for _ in range(2)]
REQUESTS: list[tuple[np.ndarray[Any, Any] | None, str, dict[str, Any]]] = [
    (None, "Count to ten.", {}),
    (None, "A much longer question, " * 12, {}),
    (None, "x", {}),
    (None, "Grüße an 世界", {}),
    (None, "Sampled, with a seed of its own.", {"temperature": 1.0, "seed": 5}),
    (IMAGES[0], "What is this?", {"max_crops": 1}),
    (IMAGES[1], "Describe this image.", {"max_crops": 1}),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model": str(write_checkpoint(tmp_path_factory.mktemp("random") / "molmo", seed=3)),
        "cache_dir": tmp_path_factory.mktemp("cache"),
        "engine": "process",
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "kv_cache_memory_gb": 0.25,
        "enforce_eager": True,
    }


@pytest.fixture(scope="module")
def random_vlm(settings: dict[str, Any]) -> Iterator[EdgeVLM]:
    with EdgeVLM(**settings) as vlm:
        yield vlm


def ask(vlm: EdgeVLM, i: int) -> Result:
    image, text, options = REQUESTS[i]
    return vlm.query(image, text, max_tokens=24, ignore_eos=True, logprobs=1, **options)


@pytest.fixture(scope="module")
def alone(random_vlm: EdgeVLM) -> list[Result]:
    """Each request with the engine to itself."""
    results = [ask(random_vlm, i) for i in range(len(REQUESTS))]
    # The answers differ, or the comparison would show nothing.
    assert len({r.token_ids for r in results}) == len(REQUESTS)
    return results


def assert_same(result: Result, other: Result) -> None:
    assert result.token_ids == other.token_ids
    assert result.text == other.text
    assert result.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_requests_at_once_equal_the_same_requests_alone(
    random_vlm: EdgeVLM, alone: list[Result]
) -> None:
    start = threading.Barrier(len(REQUESTS))

    def caller(i: int) -> None:
        image, text, options = REQUESTS[i]
        start.wait()
        stream = random_vlm.stream(
            image, text, max_tokens=24, ignore_eos=True, logprobs=1, **options
        )
        deltas = list(stream)
        assert "".join(deltas) == stream.result().text
        assert_same(stream.result(), alone[i])

    in_threads([lambda i=i: caller(i) for i in range(len(REQUESTS))])  # type: ignore[misc]


def test_neighbours_that_fail_or_leave_change_no_answer(
    random_vlm: EdgeVLM, alone: list[Result]
) -> None:
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            for bad in (b"no image", None):
                with pytest.raises(InputError):
                    random_vlm.query(bad, "" if bad is None else "q")
            stream = random_vlm.stream(None, "noise", ignore_eos=True, max_tokens=900)
            next(stream)
            stream.cancel()
            with pytest.raises(RequestCancelled):
                stream.result()

    def compare() -> None:
        try:
            for i, expected in enumerate(alone):
                assert_same(ask(random_vlm, i), expected)
        finally:
            over.set()

    in_threads([disturb, compare])


def test_drafts_and_a_cached_prefix_change_no_token(
    settings: dict[str, Any], random_vlm: EdgeVLM, tmp_path: Path
) -> None:
    # A prompt that repeats itself feeds the drafts, as do the loops of random weights.
    prompts = [
        (None, "point to the red mug on the table, " * 20),
        (IMAGES[0], "How many red mug are there? " * 4),
    ]

    def answers(vlm: EdgeVLM) -> list[Result]:
        return [vlm.query(i, text, max_tokens=48, ignore_eos=True) for i, text in prompts]

    plain = answers(random_vlm)
    with EdgeVLM(
        **{**settings, "max_num_seqs": 1},
        speculation="ngram",
        enable_prefix_caching=True,
        engine_args={"disable_log_stats": False},
    ) as vlm:
        results = [answers(vlm), answers(vlm)]

        def drafted(engine: Any) -> tuple[float, float]:
            from vllm.v1.metrics.reader import get_metrics_snapshot

            values = {m.name: getattr(m, "value", 0) for m in get_metrics_snapshot()}
            prefix = "vllm:spec_decode_num_"
            return values[f"{prefix}draft_tokens"], values[f"{prefix}accepted_tokens"]

        tokens, accepted = vlm.in_engine_thread(drafted)
    for again in results:
        assert [r.token_ids for r in again] == [r.token_ids for r in plain]
    assert all(r.metrics.cached_tokens for r in results[1])
    assert 0 < accepted <= tokens
