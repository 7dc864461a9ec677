"""Whole runs on a double: what is kept, what is apart, when a row ends, what survives a failure."""

from __future__ import annotations

import sys
import textwrap
import threading
from dataclasses import replace
from typing import Any

import pytest

from molmo_edge.bench import report, scenarios
from molmo_edge.bench.cases import text_only
from molmo_edge.bench.document import Document
from molmo_edge.bench.measure import RunOptions
from molmo_edge.errors import EngineDeadError, GenerationError, ImageError, QueueFull
from tests.bench.double import CASES, ENVIRONMENT, OPTIONS, DoubleVLM, make_bench, measure


def fails_at(number: int, error: BaseException) -> Any:
    return lambda n: error if n == number else None


def test_first_request_cold_and_steady_are_kept_apart() -> None:
    # Request 0 is the engine's first; iterations 0 to 2 of the first case are slow.
    result = measure(DoubleVLM(speed=lambda n: 20.0 if n < 4 else 50.0))
    assert result.complete and result.startup is not None
    assert result.startup.first_request is not None
    assert result.startup.stages == {"imports": 2.0, "engine": 9.0}
    assert result.startup.first_request.output_tps == 20.0
    row = result.scenarios[0].rows[0]
    assert row.steady_from == 3
    assert row.cold["output_tps"].mean == pytest.approx(20.0) and row.cold["output_tps"].n == 3
    assert row.steady["output_tps"].mean == pytest.approx(50.0)
    assert row.samples[0].prefill_s == pytest.approx(0.25)
    assert row.samples[0].wall_s == pytest.approx(row.samples[0].e2e_s)


@pytest.mark.parametrize(
    ("speed", "options", "stopped", "counts"),
    [
        (lambda n: 50.0, {}, "narrow", [6, 6]),
        (lambda n: 50.0 + 8 * (n % 3), {"max_iterations": 12}, "cap", [12, 12]),
        # 0.88 s per request, and five seconds for each row.
        (lambda n: 50.0, {"iterations": 30, "time_limit_s": 10}, "time", [6, 6]),
    ],
)
def test_a_row_ends_when_narrow_at_its_maximum_or_at_the_time_limit(
    speed: Any, options: dict[str, Any], stopped: str, counts: list[int]
) -> None:
    options = {"iterations": 6, "max_iterations": 50, "max_tokens": 20, **options}
    result = measure(DoubleVLM(speed=speed), options=RunOptions(**options))
    rows = result.scenarios[0].rows
    assert [row.stopped for row in rows] == [stopped, stopped]
    assert [len(row.samples) for row in rows] == counts


@pytest.mark.parametrize(("cached", "proved"), [(0, True), (16, False), (None, None)])
def test_no_image_is_used_twice_and_the_engines_counter_decides(
    cached: int | None, proved: bool | None
) -> None:
    vlm = DoubleVLM(cached=cached)
    result = measure(vlm)
    assert len(set(vlm.images)) == len(vlm.images) == 13
    for row in result.scenarios[0].rows:
        assert row.caches is not None
        assert (row.caches.mode, row.caches.cached_tokens) == ("off", cached)
        assert row.caches.proved is proved
    assert vlm.resets == 2


def test_repeat_frame_uses_one_image_on_an_engine_with_caches() -> None:
    vlm, opened = DoubleVLM(cached=1200), list[bool]()

    def build(caches: bool) -> DoubleVLM:
        opened.append(caches)
        return vlm

    result = scenarios.run(make_bench(vlm, cases=CASES[:1]), build, ["repeat-frame"])
    row = result.scenarios[0].rows[0]
    assert opened == [True]
    assert row.caches is not None and (row.caches.mode, row.caches.proved) == ("on", True)
    assert len(set(vlm.images)) == 1


@pytest.mark.parametrize(("random", "matched", "notes"), [(True, None, 1), (False, 2, 0)])
def test_random_weights_are_noted_and_known_answers_not_judged(
    random: bool, matched: int | None, notes: int
) -> None:
    vlm = DoubleVLM()
    vlm.environment["random_weights"] = random
    result = measure(vlm)
    answer = result.scenarios[0].rows[0].answer
    assert answer is not None and (answer.matched, len(result.notes)) == (matched, notes)


def test_every_document_names_versions_model_and_device() -> None:
    environment = measure(DoubleVLM()).environment
    software = environment.software
    expected = ("vllm", "torch", "transformers", "python", "molmo_edge")
    assert software == {name: ENVIRONMENT[name] for name in expected}
    assert environment.model.name == "double" and environment.model.kv_cache_dtype == "fp8"
    assert environment.device.name == "a test"


def test_the_document_is_saved_while_a_row_runs() -> None:
    saved: list[Document] = []
    slow = DoubleVLM(speed=lambda n: 5.0)
    measure(slow, cases=CASES[:1], save=lambda d: saved.append(d.model_copy(deep=True)))
    lengths = {len(d.scenarios[0].rows[0].samples) for d in saved if d.scenarios[0].rows}
    assert len(lengths) > 2
    assert [d.complete for d in saved] == [False] * (len(saved) - 1) + [True]


def test_a_lost_request_is_a_sample() -> None:
    result = measure(DoubleVLM(failure=fails_at(3, GenerationError("lost"))))
    row = result.scenarios[0].rows[0]
    assert row.samples[2].error == "GenerationError: lost"
    assert (row.counts["failed"], row.all["output_tps"].n, result.complete) == (1, 5, True)


@pytest.mark.parametrize(
    ("last", "error", "samples"), [(1, ImageError("too large"), 0), (3, GenerationError("lost"), 3)]
)
def test_a_bad_image_or_three_lost_requests_end_their_row_only(
    last: int, error: Exception, samples: int
) -> None:
    result = measure(DoubleVLM(failure=lambda n: error if 1 <= n <= last else None))
    rows = result.scenarios[0].rows
    assert [row.stopped for row in rows] == ["error", "narrow"] and not result.complete
    assert str(error) in (rows[0].error or "") and len(rows[0].samples) == samples


def test_a_crash_ends_its_scenario_only(caplog: pytest.LogCaptureFixture) -> None:
    result = measure(DoubleVLM(failure=fails_at(3, RuntimeError("a bug"))), "report", "text")
    report, text = result.scenarios
    assert report.error == "RuntimeError: a bug" and len(report.rows[0].samples) == 2
    assert text.complete and not result.complete
    assert "scenario report crashed" in caplog.text


def test_a_dead_engine_leaves_a_partial_result_and_other_engines_their_scenarios() -> None:
    engines = [DoubleVLM(failure=fails_at(3, EngineDeadError("step failed"))), DoubleVLM()]
    bench = make_bench(engines[0])
    result = scenarios.run(bench, lambda caches: engines.pop(0), ["report", "text", "repeat-frame"])
    report, text, repeated = result.scenarios
    assert "step failed" in (report.error or "") and len(report.rows[0].samples) == 2
    assert text.rows == [] and "not run, no engine" in (text.error or "")
    assert repeated.complete and not result.complete


@pytest.mark.parametrize("error", [ImageError("bad"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_the_sampler_stops_however_a_row_ends(error: BaseException) -> None:
    before = threading.active_count()
    measure(DoubleVLM(failure=fails_at(2, error)), sensors=True)
    assert threading.active_count() == before


def test_random_weights_have_answers_of_fixed_length_and_a_short_limit() -> None:
    stub, trained = RunOptions.choose(True), RunOptions.choose(False, iterations=7, fps=None)
    assert (stub.ignore_eos, stub.time_limit_s, stub.iterations) == (True, 210.0, 10)
    assert (trained.ignore_eos, trained.max_tokens, trained.max_iterations) == (False, 300, 14)


def test_a_batch_is_measured_as_a_whole_and_by_request() -> None:
    vlm = DoubleVLM(failure=fails_at(1, GenerationError("lost")))
    result = measure(vlm, "throughput", options=replace(OPTIONS, batches=(1, 3)))
    single, triple = result.scenarios[0].rows
    assert (single.waves[0].output_tokens, single.counts["failed"]) == (0, 1)
    wave = triple.waves[0]
    assert wave.output_tokens == 60
    # The double answers one after another: 3 x (0.5 + 19/50) s.
    assert wave.wall_s == pytest.approx(3 * 0.88)
    assert triple.steady["total_tps"].mean == pytest.approx(60 / 2.64)
    assert len(triple.samples) == 3 * len(triple.waves)
    assert len(set(vlm.images)) == len(vlm.images)


@pytest.mark.parametrize(("fps", "dropped"), [(10.0, 7.8), (1.0, 0.0)])
def test_a_camera_drops_what_came_while_the_engine_was_busy(fps: float, dropped: float) -> None:
    row = measure(DoubleVLM(), "camera", options=replace(OPTIONS, fps=fps)).scenarios[0].rows[0]
    assert (row.counts["offered"] or 0) - (row.counts["dropped"] or 0) == len(row.samples)
    # Every answer takes 0.88 s.
    assert (row.counts["dropped"] or 0) / (len(row.samples) - 1) == pytest.approx(dropped, abs=0.4)
    assert all(0.879 <= (sample.wall_s or 0) < 0.981 for sample in row.samples)


def test_an_image_scenario_without_images_is_an_error() -> None:
    result = measure(DoubleVLM(), "camera", cases=text_only())
    assert "--image" in (result.scenarios[0].error or "")


def test_videos_are_drawn_fresh_and_rows_say_frames_and_tokens() -> None:
    vlm = DoubleVLM()
    result = measure(vlm, "video", options=replace(OPTIONS, frames=(3, 8)))
    rows = result.scenarios[0].rows
    assert [(row.title, row.conditions["frames"]) for row in rows] == [
        ("3 frames", 3),
        ("8 frames", 8),
    ]
    assert len(set(vlm.images)) == len(vlm.images)
    assert "3 frames: 1190 of 1210 prompt tokens are the video's" in report.markdown(result)


def test_a_model_without_video_skips_the_scenario_and_says_so() -> None:
    result = measure(DoubleVLM(video=False), "video", "text")
    assert result.complete and not any(s.rows for s in result.scenarios if s.name == "video")
    assert any("the model has no video" in note for note in result.notes)


CHILD = """
    import json, os, sys, time
    request = json.loads(sys.stdin.read())
    marker = os.path.join(os.environ["VLLM_CACHE_ROOT"], "seen")
    seen = os.path.exists(marker)
    os.makedirs(os.environ["VLLM_CACHE_ROOT"], exist_ok=True)
    open(marker, "w").close()
    now = time.time()
    sample = {"iteration": 0, "ttft_s": 1.0 if seen else 9.0}
    sample["output_tokens"] = request["max_tokens"]
    sample["finish_reason"] = request["text"]
    print(json.dumps({"running_at": now, "first_token_at": now + 5, "stages": {"engine": 3.0},
                      "sample": sample}))
    print("noise of a library")
"""


def test_cold_starts_are_fresh_processes_with_caches_of_their_own_and_need_no_engine() -> None:
    def never(caches: bool) -> DoubleVLM:
        raise AssertionError("an engine was opened")

    command = (sys.executable, "-c", textwrap.dedent(CHILD))
    bench = make_bench(DoubleVLM(), start_command=command)
    result = scenarios.run(bench, never, ["cold-start"])
    absent, present = result.scenarios[0].rows
    assert result.complete
    assert [row.conditions["disk_caches"] for row in (absent, present)] == [False, True]
    assert [sample.ttft_s for sample in absent.samples] == [9.0]
    assert [sample.ttft_s for sample in present.samples] == [1.0, 1.0]
    assert all(5 <= (s.wall_s or 0) < 60 for s in (*absent.samples, *present.samples))
    assert (absent.samples[0].output_tokens, absent.counts["engine_s"]) == (20, 3.0)
    assert absent.samples[0].finish_reason == bench.cases[0].question == absent.prompt
    assert absent.caches is None


def test_a_start_that_fails_gives_its_last_line() -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no such model')")
    result = measure(DoubleVLM(), "cold-start", start_command=command)
    assert result.scenarios[0].rows[0].samples[0].error == "exit status 1: no such model"


def test_users_each_send_their_requests() -> None:
    vlm = DoubleVLM(speed=lambda n: 2000.0)
    result = measure(vlm, "concurrency", options=replace(OPTIONS, users=(1, 4)))
    rows = result.scenarios[0].rows
    assert [len(row.samples) for row in rows] == [6, 24]
    assert (rows[1].counts["total_tps"] or 0) > 0 and rows[1].stopped == "fixed"


def test_a_full_queue_is_a_lost_request_and_a_dead_engine_ends_the_row() -> None:
    load = replace(OPTIONS, users=(2,))
    full = DoubleVLM(failure=fails_at(2, QueueFull("no room")))
    row = measure(full, "concurrency", options=load).scenarios[0].rows[0]
    assert [sample.error for sample in row.samples].count("QueueFull: no room") == 1
    dead = DoubleVLM(failure=fails_at(4, EngineDeadError("gone")))
    scenario = measure(dead, "concurrency", options=load).scenarios[0]
    assert scenario.rows[0].stopped == "error" and "gone" in (scenario.error or "")
    assert 0 < len(scenario.rows[0].samples) < 12


def test_concurrent_users_end_with_the_scenarios_time() -> None:
    load = replace(OPTIONS, users=(2,), time_limit_s=2.0)
    scenario = measure(DoubleVLM(), "concurrency", options=load).scenarios[0]
    row = scenario.rows[0]
    # 0.88 seconds a request; the other user's last request is kept.
    assert (row.stopped, scenario.complete) == ("time", True) and len(row.samples) in (3, 4)
