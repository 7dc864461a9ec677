"""Levers that claim to change nothing but time: n-gram drafts and caches give the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from molmo_edge import EdgeVLM
from molmo_edge.models.molmo.synthetic import write_checkpoint
from molmo_edge.reference.verify import synthetic_image as picture

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

PICTURE = picture(90, 120, 0)
# Answers of random weights fall into loops, and a prompt that repeats itself feeds the drafts too.
QUESTIONS = (
    (None, "point to the red mug on the table, " * 6),
    (None, "What is in the picture?"),
    (PICTURE, "How many red mug are there? " * 4),
)


@contextmanager
def engine(model: str | Path, cache_dir: Path, **settings: Any) -> Iterator[EdgeVLM]:
    with EdgeVLM(
        model,
        cache_dir=cache_dir,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=1,
        kv_cache_memory_gb=0.25,
        **settings,
    ) as vlm:
        yield vlm


def answers(vlm: EdgeVLM) -> list[tuple[int, ...]]:
    """Greedy tokens of every question, none ended early."""
    return [
        tuple(vlm.query(image, text, max_tokens=48, ignore_eos=True).token_ids)
        for image, text in QUESTIONS
    ]


def drafted(vlm: EdgeVLM) -> tuple[int, int]:
    """Tokens drafted and accepted so far, as vLLM counts them."""
    metrics = vlm.in_engine_thread(lambda engine: engine.llm.get_metrics())
    counts = {metric.name: getattr(metric, "value", 0) for metric in metrics}
    return (
        int(counts["vllm:spec_decode_num_draft_tokens"]),
        int(counts["vllm:spec_decode_num_accepted_tokens"]),
    )


@pytest.mark.parametrize("model", ["stub", "random weights"])
def test_ngram_drafts_change_no_token(model: str, cache_dir: Path, tmp_path: Path) -> None:
    folder = model if model == "stub" else write_checkpoint(tmp_path / "random", seed=11)
    with engine(folder, cache_dir) as vlm:
        plain = answers(vlm)
    with engine(
        folder, cache_dir, speculation="ngram", engine_args={"disable_log_stats": False}
    ) as vlm:
        assert answers(vlm) == plain
        tokens, accepted = drafted(vlm)
    assert 0 < accepted <= tokens


def test_a_cached_prefix_changes_no_token(cache_dir: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "random", seed=11)
    with engine(folder, cache_dir, enable_prefix_caching=True) as vlm:
        first = [vlm.query(image, text, max_tokens=12) for image, text in QUESTIONS]
        second = [vlm.query(image, text, max_tokens=12) for image, text in QUESTIONS]
    for one, other in zip(first, second, strict=True):
        assert one.token_ids == other.token_ids
    assert any(result.metrics.cached_tokens for result in second)
