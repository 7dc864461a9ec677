"""Warm-up: which requests it runs, when it stops, and its report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import ConfigError
from molmo_edge.models.gemma3 import Gemma3, Gemma3Text
from molmo_edge.requests import Request
from molmo_edge.results import Metrics, Result
from molmo_edge.settings import EdgeSettings
from molmo_edge.warmup import AGREEMENT, batch_sizes, warm


class Scripted:
    """Stands in for an `EdgeVLM` whose single requests have these decode speeds, in order."""

    def __init__(self, speeds: Iterable[float | None], family: Any = None, **settings: Any) -> None:
        self.settings = EdgeSettings(**settings)
        self.family = family
        self.startup = {"total": 3.0}
        self.batches: list[list[Request]] = []
        self._speeds = iter(speeds)

    def batch(self, requests: Sequence[Request]) -> list[Result]:
        self.batches.append(list(requests))
        measured = "100" in requests[0].text  # rounds of decode have numbers of their own
        speed = next(self._speeds) if measured else 1.0
        metrics = Metrics(ttft_s=0.1, prompt_tokens=9, output_tokens=4, output_tps=speed)
        return [Result("x", "length", (1,), metrics=metrics) for _ in requests]


def warm_up(vlm: Any, tokens: int = 32, max_rounds: int = 10) -> Any:
    return warm(vlm.batch, vlm.settings, vlm.family, vlm.startup, tokens, max_rounds)


def test_every_kind_of_request_runs_once_before_speed_is_measured() -> None:
    fake = FakeEngine.factory()
    with EdgeVLM(engine=fake, max_num_seqs=4) as vlm:
        report = vlm.warmup(tokens=3, max_rounds=2)
    kinds = [(step.name, step.requests) for step in report.steps]
    assert kinds == [
        ("text", 1), ("global view", 1), ("all crops", 1), ("batch of 2", 2), ("batch of 4", 4),
    ]  # fmt: skip
    assert len(fake.engine.prompts) == 9 + len(report.decode_tps)
    assert all(step.output_tokens == 3 * step.requests for step in report.steps)
    assert all(step.seconds is not None and step.ttft_s is not None for step in report.steps)
    assert len(report.decode_tps) == 2
    assert report.as_dict()["steps"][0]["skipped"] is None
    for options in ({"tokens": 1}, {"max_rounds": 1}):
        with pytest.raises(ConfigError, match="at least 2"):
            warm_up(Scripted([]), **options)


@pytest.mark.parametrize(
    ("speeds", "taken", "steady"),
    [
        ([50, 70, 71.0, 200], 3, True),
        ([100, 97], 2, True),
        ([100, 96.9, 90, 80, 70], 5, False),
        ([97, 100], 2, True),
        ([None], 0, False),
    ],
)
def test_it_ends_when_two_successive_speeds_agree(
    speeds: list[float | None], taken: int, steady: bool
) -> None:
    report = warm_up(Scripted(speeds), max_rounds=5)
    assert (len(report.decode_tps), report.steady) == (taken, steady)
    if steady:
        last, before = report.decode_tps[-1], report.decode_tps[-2]
        assert abs(last - before) <= AGREEMENT * max(last, before)


def test_requests_longer_than_the_context_are_skipped_with_the_reason() -> None:
    with EdgeVLM(engine=FakeEngine.factory(max_model_len=80), max_num_seqs=1) as vlm:
        report = vlm.warmup(tokens=4, max_rounds=2)
    skipped = {step.name: step.skipped for step in report.steps}
    reason = "longer than max_model_len"
    assert skipped == {"text": None, "global view": reason, "all crops": reason}
    assert len(report.decode_tps) == 2  # measured on what fits


def test_no_image_and_no_text_is_repeated() -> None:
    vlm = Scripted([10, 20, 20])
    warm_up(vlm)
    for batch in vlm.batches:
        assert len({request.text for request in batch}) == len(batch)
        images = [request.image for request in batch if request.image is not None]
        assert len({np.asarray(image).tobytes() for image in images}) == len(images)
    rounds = [batch[0] for batch in vlm.batches if "100" in batch[0].text]
    assert len({np.asarray(request.image).tobytes() for request in rounds}) == 3
    assert all(request.ignore_eos for batch in vlm.batches for request in batch)


def test_families_without_crops_or_images_get_neither() -> None:
    gemma = Scripted([5, 5], Gemma3(), max_num_seqs=1)
    names = [step.name for step in warm_up(gemma).steps]
    assert names == ["text", "image"]
    assert all(request.max_crops is None for batch in gemma.batches for request in batch)
    text = Scripted([5, 5], Gemma3Text(), max_num_seqs=2)
    assert [step.name for step in warm_up(text).steps] == ["text", "batch of 2"]
    assert all(request.image is None for batch in text.batches for request in batch)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"max_num_seqs": 1}, (1,)),
        ({"max_num_seqs": 8}, (2, 4, 8)),
        ({"max_num_seqs": 6}, (2, 4, 6)),
        (
            {
                "max_num_seqs": 8,
                "engine_args": {"compilation_config": {"cudagraph_capture_sizes": [1, 3, 8, 16]}},
            },
            (3, 8),
        ),
    ],
)
def test_batch_sizes_are_graph_sizes_or_powers_of_two(
    settings: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    assert batch_sizes(EdgeSettings(**settings)) == sizes


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_engine_warms_up_and_continues(stub_vlm: EdgeVLM) -> None:
    report = stub_vlm.warmup(tokens=4, max_rounds=2)
    tokens = {step.name: step.prompt_tokens for step in report.steps}
    assert tokens["text"] is not None and tokens["text"] < 64
    assert tokens["global view"] is not None and tokens["global view"] > 316
    assert tokens["all crops"] is not None and tokens["all crops"] > tokens["global view"]
    assert [step.output_tokens for step in report.steps] == [4, 4, 4, 8, 16, 32]
    assert len(report.decode_tps) == 2 and min(report.decode_tps) > 0
    assert stub_vlm.query(None, "x", max_tokens=2).text == "This is"
