"""Warm-up: which requests it runs, when it stops, and its report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from molmo_edge import EdgeVLM, Request, Result
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import ConfigError
from molmo_edge.models.gemma3 import Gemma3
from molmo_edge.models.molmo2.family import Molmo2
from molmo_edge.results import Metrics
from molmo_edge.settings import EdgeSettings
from molmo_edge.warmup import AGREEMENT, WarmupReport, warm


class Script:
    """Answers batches; requests of the decode rounds, which have no image, at these speeds."""

    def __init__(self, speeds: Iterable[float | None] = (5, 5)) -> None:
        self.batches: list[list[Request]] = []
        self._speeds = iter(speeds)

    def batch(self, requests: list[Request]) -> list[Result]:
        self.batches.append(requests)
        speed = next(self._speeds) if "100" in requests[0].text else 1.0
        metrics = Metrics(ttft_s=0.1, prompt_tokens=9, output_tokens=4, output_tps=speed)
        return [Result("x", "length", (1,), metrics=metrics) for _ in requests]

    def warm(self, family: Any = None, **settings: Any) -> WarmupReport:
        return warm(self.batch, EdgeSettings(**settings), family, 32, 5)


def test_every_kind_of_request_runs_once_before_speed_is_measured() -> None:
    fake = FakeEngine.factory()
    with EdgeVLM(engine=fake, max_num_seqs=6) as vlm:
        report = vlm.warmup(tokens=np.int64(3), max_rounds=2)
        for options in ({"tokens": 1}, {"max_rounds": 1}):
            with pytest.raises(ConfigError, match="at least 2"):
                vlm.warmup(**options)
    assert [(step.name, step.requests) for step in report.steps] == [
        ("text", 1), ("global view", 1), ("all crops", 1),
        ("batch of 2", 2), ("batch of 4", 4), ("batch of 6", 6),
    ]  # fmt: skip
    assert len(fake.engine.prompts) == 15 + 2
    assert all(step.seconds is not None and step.ttft_s is not None for step in report.steps)
    assert len(report.decode_tps) == 2
    assert len(set(fake.engine.prompts[-2:])) == 2


@pytest.mark.parametrize(
    ("speeds", "taken", "steady"),
    [
        ([50, 70, 71.0, 200], 3, True),
        ([100, 97], 2, True),
        ([100, 96.9, 90, 80, 70], 5, False),
        ([None], 0, False),
    ],
)
def test_it_ends_when_two_successive_speeds_agree(
    speeds: list[float | None], taken: int, steady: bool
) -> None:
    report = Script(speeds).warm()
    assert (len(report.decode_tps), report.steady) == (taken, steady)
    if steady:
        last, before = report.decode_tps[-1], report.decode_tps[-2]
        assert abs(last - before) <= AGREEMENT * max(last, before)


def test_requests_longer_than_the_context_are_skipped() -> None:
    with EdgeVLM(engine=FakeEngine.factory(max_model_len=80), max_num_seqs=1) as vlm:
        report = vlm.warmup(tokens=4, max_rounds=2)
    assert [step.seconds is None for step in report.steps] == [False, True, True]
    assert len(report.decode_tps) == 2


def test_no_image_and_no_text_is_repeated_within_a_batch() -> None:
    script = Script()
    script.warm()
    for batch in script.batches:
        assert len({request.text for request in batch}) == len(batch)
        images = [request.image for request in batch if request.image is not None]
        assert len({np.asarray(image).tobytes() for image in images}) == len(images)


def test_families_without_crops_get_none() -> None:
    gemma = Script()
    assert [step.name for step in gemma.warm(Gemma3(), max_num_seqs=1).steps] == ["text", "image"]
    assert all(request.options["max_crops"] is None for [request] in gemma.batches)


def test_families_with_video_get_one() -> None:
    steps = Script().warm(Molmo2(), max_num_seqs=1).steps
    assert [step.name for step in steps] == ["text", "global view", "all crops", "video"]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_engine_warms_up_and_continues(
    stub_vlm: EdgeVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stub_vlm.settings.model_copy(update={"max_num_seqs": 1})
    monkeypatch.setattr(stub_vlm, "settings", settings)
    report = stub_vlm.warmup(tokens=4, max_rounds=2)
    assert [step.name for step in report.steps] == ["text", "global view", "all crops", "video"]
    assert all(step.seconds is not None for step in report.steps)
    assert len(report.decode_tps) == 2 and min(report.decode_tps) > 0
    assert stub_vlm.query(None, "x", max_tokens=2).text == "This is"
