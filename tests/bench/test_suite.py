"""Whole runs on a double: what is kept, what is apart, when a row ends, what survives a failure."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from molmo_edge.bench import document, store, suite
from molmo_edge.bench.cases import Case, text_only
from molmo_edge.bench.document import Document
from molmo_edge.bench.measure import Plan
from molmo_edge.bench.suite import Suite
from molmo_edge.errors import (
    BenchmarkError,
    EngineDeadError,
    EngineStartError,
    GenerationError,
    ImageError,
)
from tests.bench.double import DoubleVLM, FakeClock

CASES = (
    Case("one", "One", "What?", Image.new("RGB", (8, 6)), ("10", "15")),
    Case("two", "Two", "Why?", Image.new("RGB", (6, 8), (9, 9, 9))),
)
PLAN = Plan(iterations=6, max_iterations=12, max_tokens=20)


def ran(vlm: DoubleVLM, **kwargs: Any) -> tuple[Document, list[Document]]:
    saved: list[Document] = []
    kwargs.setdefault("cases", CASES)
    kwargs.setdefault("plan", PLAN)
    kwargs.setdefault("open", lambda caches: vlm)
    result = Suite(
        clock=vlm.clock, save=lambda d: saved.append(d.model_copy(deep=True)), **kwargs
    ).run()
    return result, saved


def double(**kwargs: Any) -> DoubleVLM:
    return DoubleVLM(FakeClock(), **kwargs)


def test_first_request_cold_and_steady_are_kept_apart() -> None:
    # Request 0 is the first; iterations 0-2 of the first case are slow.
    vlm = double(speed=lambda n: 20.0 if n < 4 else 50.0)
    result, _ = ran(vlm)
    assert result.complete
    assert result.startup is not None and result.startup.first_request is not None
    assert result.startup.stages == {"imports": 2.0, "build": 9.0}
    assert result.startup.first_request.output_tps == 20.0
    row = result.scenarios[0].rows[0]
    assert row.warmup is not None and row.warmup.start == 3
    assert row.cold["output_tps"].mean == pytest.approx(20.0)
    assert row.steady["output_tps"].mean == pytest.approx(50.0)
    assert row.cold["output_tps"].n == 3
    assert row.samples[0].prefill_s == pytest.approx(0.25)
    assert row.samples[0].wall_s == pytest.approx(row.samples[0].e2e_s or 0)


def test_a_row_ends_when_narrow_and_goes_on_when_not() -> None:
    steady, _ = ran(double())
    assert [row.stopped for row in steady.scenarios[0].rows] == ["narrow", "narrow"]
    assert [len(row.samples) for row in steady.scenarios[0].rows] == [6, 6]
    noisy, _ = ran(double(speed=lambda n: 50.0 + 8 * (n % 3)))
    assert [row.stopped for row in noisy.scenarios[0].rows] == ["cap", "cap"]
    assert [len(row.samples) for row in noisy.scenarios[0].rows] == [12, 12]


def test_a_spent_time_limit_leaves_the_least_number() -> None:
    plan = Plan(iterations=6, max_iterations=50, max_tokens=20, time_limit_s=0.001)
    result, _ = ran(double(speed=lambda n: 50.0 + 8 * (n % 3)), plan=plan)
    assert [row.stopped for row in result.scenarios[0].rows] == ["time", "time"]
    assert [len(row.samples) for row in result.scenarios[0].rows] == [6, 6]


def test_a_firm_time_limit_ends_a_row_before_its_least_number_and_says_so() -> None:
    plan = Plan(iterations=30, max_iterations=50, max_tokens=20, time_limit_s=10.0, firm=True)
    result, _ = ran(double(), plan=plan)
    rows = result.scenarios[0].rows
    assert [row.stopped for row in rows] == ["short", "short"]
    # 0.88 s a request, the first one and both rows within ten seconds and a request begun.
    assert [len(row.samples) for row in rows] == [6, 5]
    assert "10 s goes before the least number" in result.rules["stop"]


def test_no_picture_is_shown_twice_and_the_counter_proves_it() -> None:
    vlm = double()
    result, _ = ran(vlm)
    pictures = [image.tobytes() for image, _, _ in vlm.asked if image is not None]
    assert len(set(pictures)) == len(pictures) == 13
    for row in result.scenarios[0].rows:
        assert row.caches is not None
        assert (row.caches.mode, row.caches.cached_tokens, row.caches.proved) == ("off", 0, True)
    assert vlm.resets == 2


@pytest.mark.parametrize(("cached", "proved"), [(16, False), (None, None)])
def test_reuse_is_reported_and_silence_is_no_proof(cached: int | None, proved: bool | None) -> None:
    result, _ = ran(double(cached=cached))
    caches = result.scenarios[0].rows[0].caches
    assert caches is not None
    assert (caches.cached_tokens, caches.proved) == (cached, proved)


def test_repeat_frame_shows_one_picture_to_an_engine_with_caches() -> None:
    vlm = double(cached=1200)
    opened: list[bool] = []

    def build(caches: bool) -> DoubleVLM:
        opened.append(caches)
        return vlm

    result, _ = ran(vlm, open=build, names=("repeat-frame",))
    assert opened == [True]
    row = result.scenarios[0].rows[0]
    assert row.caches is not None and (row.caches.mode, row.caches.proved) == ("on", True)
    shown = [image for image, text, _ in vlm.asked[1:] if text == "What?"]
    assert len({image.tobytes() for image in shown if image}) == 1


def test_random_weights_are_said_and_known_answers_not_judged() -> None:
    result, _ = ran(double())
    assert any("random weights" in note for note in result.notes)
    answer = result.scenarios[0].rows[0].answer
    assert answer is not None and answer.matched is None
    vlm = double()
    vlm.environment["random_weights"] = False
    real, _ = ran(vlm)
    answer = real.scenarios[0].rows[0].answer
    assert answer is not None and answer.matched == 2
    assert real.notes == []


def test_every_document_names_the_versions() -> None:
    result, _ = ran(double())
    software = result.environment.software
    assert (software.vllm, software.torch, software.transformers) == (
        "0.32.0",
        "2.13.0+cpu",
        "5.17.0",
    )
    assert result.environment.model.kv_cache_dtype == "fp8"
    assert result.environment.device.name == "a test"


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    vlm = double(failure=lambda n: KeyboardInterrupt() if n == 9 else None)
    path = tmp_path / "r.json"
    result = Suite(
        open=lambda caches: vlm,
        cases=CASES,
        plan=PLAN,
        clock=vlm.clock,
        save=lambda d: store.write(d, path),
    ).run()
    assert not result.complete
    assert vlm.closed
    kept = store.load(path)
    assert not kept.complete
    assert [row.stopped for row in kept.scenarios[0].rows] == ["narrow", "interrupted"]
    assert len(kept.scenarios[0].rows[1].samples) == 2
    assert any("interrupted" in note for note in kept.notes)


def test_the_document_is_saved_while_a_row_runs() -> None:
    _, saved = ran(double(speed=lambda n: 5.0), cases=CASES[:1])
    lengths = [len(d.scenarios[0].rows[0].samples) for d in saved if d.scenarios[0].rows]
    assert len(set(lengths)) > 2
    assert not any(d.complete for d in saved[:-1])
    assert saved[-1].complete


def test_a_lost_request_is_a_sample_and_many_end_the_row() -> None:
    one, _ = ran(double(failure=lambda n: GenerationError("lost") if n == 3 else None))
    row = one.scenarios[0].rows[0]
    assert row.samples[2].error == "GenerationError: lost"
    assert row.counts["failed"] == 1
    assert row.all["output_tps"].n == 5
    assert one.complete
    all_lost, _ = ran(double(failure=lambda n: GenerationError("lost") if 0 < n < 10 else None))
    rows = all_lost.scenarios[0].rows
    assert rows[0].stopped == "error" and "lost" in (rows[0].error or "")
    assert len(rows[0].samples) == 3
    assert not all_lost.complete


def test_a_picture_that_fails_ends_its_row_only() -> None:
    vlm = double()
    query = vlm.query

    def choosy(image: Any, text: str, **options: Any) -> Any:
        if text == "What?" and len(vlm.asked) > 0:
            raise ImageError("too large")
        return query(image, text, **options)

    vlm.query = choosy  # type: ignore[method-assign]
    result, _ = ran(vlm)
    rows = result.scenarios[0].rows
    assert [row.stopped for row in rows] == ["error", "narrow"]
    assert "too large" in (rows[0].error or "")
    assert not result.complete


def test_an_engine_that_dies_is_replaced_for_the_next_scenario() -> None:
    clock = FakeClock()
    first = DoubleVLM(clock, failure=lambda n: EngineDeadError("step failed") if n == 3 else None)
    engines = [first, DoubleVLM(clock)]
    result, _ = ran(first, open=lambda caches: engines.pop(0), names=("report", "text"))
    report, text = result.scenarios
    assert report.error is not None and "step failed" in report.error
    assert len(report.rows[0].samples) == 2
    assert text.complete
    assert not result.complete


def test_a_crash_of_one_scenario_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    vlm = double(failure=lambda n: RuntimeError("a bug") if n == 3 else None)
    result, _ = ran(vlm, names=("report", "text"))
    report, text = result.scenarios
    assert report.error == "RuntimeError: a bug"
    assert report.rows[0].stopped == "error"
    assert len(report.rows[0].samples) == 2
    assert text.complete
    assert not result.complete
    assert "scenario report crashed" in caplog.text


def test_an_engine_that_never_comes_back_leaves_a_partial_result() -> None:
    vlm = double(failure=lambda n: EngineDeadError("step failed") if n == 3 else None)
    opened: list[int] = []

    def build(caches: bool) -> AbstractContextManager[Any]:
        opened.append(1)
        if len(opened) > 1:
            raise EngineStartError("out of memory")
        return vlm

    result, _ = ran(vlm, open=build, names=("report", "text", "camera"))
    assert [s.name for s in result.scenarios] == ["report", "text", "camera"]
    assert "out of memory" in (result.scenarios[2].error or "")
    assert len(result.scenarios[0].rows[0].samples) == 2


def test_an_engine_that_cannot_start_at_all_is_an_error() -> None:
    def build(caches: bool) -> AbstractContextManager[Any]:
        raise EngineStartError("no memory")

    with pytest.raises(EngineStartError, match="no memory"):
        ran(double(), open=build)


def test_an_unknown_scenario_lists_the_known_ones() -> None:
    with pytest.raises(BenchmarkError, match="cold-start"):
        suite.known(["speed"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"iterations": 5, "max_iterations": 4},
        {"max_tokens": 0},
        {"temperature": -1},
        {"width": 0},
        {"time_limit_s": 0},
        {"confidence": 1.0},
    ],
)
def test_a_plan_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BenchmarkError, match="must be"):
        Plan(**wrong)


def test_text_scenario_asks_without_a_picture() -> None:
    vlm = double()
    result, _ = ran(vlm, names=("text",))
    assert [row.name for row in result.scenarios[0].rows] == [c.name for c in text_only()]
    assert all(image is None for image, _, _ in vlm.asked[1:])
    assert result.scenarios[0].rows[0].caches is not None
    assert result.scenarios[0].rows[0].caches.fresh_images is None
    assert result.scenarios[0].rows[0].caches.proved is True


def test_watchers_hear_every_iteration() -> None:
    heard: list[str] = []

    class Ear:
        def scenario(self, title: str, rows: int) -> None:
            heard.append(f"{title} {rows}")

        def row(self, title: str, least: int) -> None:
            heard.append(f"{title} {least}")

        def iteration(self, row: document.Row, done: int) -> None:
            heard.append(str(done))

        def row_done(self, row: document.Row) -> None:
            heard.append(str(row.stopped))

    ran(double(), observer=Ear(), cases=CASES[:1])
    assert heard == ["The report's cases 1", "One 6", *"123456", "narrow"]
