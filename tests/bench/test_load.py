"""Many requests in flight: batches, users, arrivals, a camera, and cold starts."""

from __future__ import annotations

import json
import sys
import textwrap
from typing import Any

import pytest

from molmo_edge.bench import coldstart, load
from molmo_edge.bench.document import Row, Sample
from molmo_edge.bench.measure import Plan
from molmo_edge.bench.record import Recorder
from molmo_edge.bench.scenarios import Bench, Load
from molmo_edge.bench.suite import Suite
from molmo_edge.errors import BenchmarkError, EngineDeadError, GenerationError, QueueFull
from tests.bench.double import DoubleVLM, FakeClock
from tests.bench.test_suite import CASES, double, ran

PLAN = Plan(iterations=4, max_iterations=6, max_tokens=20)


def bench(vlm: DoubleVLM, **kwargs: Any) -> Bench:
    from molmo_edge.bench.document import Document

    recorder = Recorder(Document(created="now"), PLAN, clock=vlm.clock)
    kwargs.setdefault("cases", CASES)
    return Bench(vlm=vlm, plan=PLAN, recorder=recorder, ends=1e9, clock=vlm.clock, **kwargs)


def rows_of(made: Bench, run: Any) -> list[Row]:
    with made.recorder.scenario("s", "S", 1) as scenario:
        run(made)
    return scenario.rows


def test_a_batch_is_measured_as_a_whole_and_by_request() -> None:
    vlm = double()
    rows = rows_of(bench(vlm, load=Load(batches=(1, 3))), load.throughput)
    assert [row.conditions["batch"] for row in rows] == [1, 3]
    wave = rows[1].waves[0]
    assert (wave.requests, wave.failed, wave.output_tokens) == (3, 0, 60)
    # The double answers one after another: 3 x (0.5 + 19/50) s.
    assert wave.wall_s == pytest.approx(3 * 0.88)
    assert wave.total_tps == pytest.approx(60 / 2.64)
    assert len(rows[1].samples) == 3 * len(rows[1].waves)
    assert rows[1].steady["total_tps"].mean == pytest.approx(60 / 2.64)
    pictures = [image.tobytes() for image, _, _ in vlm.asked if image is not None]
    assert len(set(pictures)) == len(pictures)


def test_one_failure_in_a_batch_stays_one_failure() -> None:
    vlm = double(failure=lambda n: GenerationError("lost") if n == 1 else None)
    rows = rows_of(bench(vlm, load=Load(batches=(3,))), load.throughput)
    assert rows[0].waves[0].failed == 1
    assert rows[0].counts["failed"] == 1
    assert rows[0].stopped in ("narrow", "cap")


def test_closed_loop_users_each_ask_their_number_of_times() -> None:
    vlm = double()
    made = bench(vlm, load=Load(users=(1, 4), rates=(5.0,)))
    made.sleep = vlm.clock.sleep
    rows = rows_of(made, lambda b: [load._closed(b, users) for users in b.load.users])
    assert [len(row.samples) for row in rows] == [4, 16]
    assert {sample.user for sample in rows[1].samples} == {0, 1, 2, 3}
    assert rows[1].counts["total_tps"] == pytest.approx(16 * 20 / (16 * 0.88))
    assert rows[1].stopped == "fixed"


class WaitingClock(FakeClock):
    """Moves on its own whenever it is read, so that waiting for it ends."""

    def __call__(self) -> float:
        self.now += 0.05
        return self.now


def test_open_loop_counts_waiting_from_when_a_request_was_due() -> None:
    vlm = DoubleVLM(WaitingClock())
    made = bench(vlm, sleep=vlm.clock.sleep)
    rows = rows_of(made, lambda b: load._open(b, 1000.0))
    assert len(rows[0].samples) == 8
    assert rows[0].counts["offered_per_s"] == 1000.0
    # One request takes 0.88 s and the double serves one at a time: the last waits for seven.
    assert max(sample.wall_s or 0 for sample in rows[0].samples) > 7 * 0.88


def test_rates_follow_the_best_closed_loop_unless_given() -> None:
    clock = WaitingClock()
    result, _ = ran(
        DoubleVLM(clock, speed=lambda n: 2000.0),
        sleep=clock.sleep,
        names=("concurrency",),
        plan=PLAN,
        load=Load(users=(1, 2)),
    )
    loops = [row.conditions.get("loop") for row in result.scenarios[0].rows]
    assert loops == ["closed", "closed", "open", "open"]
    best = max(row.counts["requests_per_s"] or 0 for row in result.scenarios[0].rows[:2])
    rates = [row.conditions["rate"] for row in result.scenarios[0].rows[2:]]
    assert rates == [pytest.approx(best / 2), pytest.approx(best * 0.8)]


def test_a_full_queue_is_a_lost_request_and_a_dead_engine_ends_the_row() -> None:
    full = double(failure=lambda n: QueueFull("no room") if n == 1 else None)
    rows = rows_of(bench(full), lambda b: load._closed(b, 2))
    assert [sample.error for sample in rows[0].samples].count("QueueFull: no room") == 1
    dead = double(failure=lambda n: EngineDeadError("gone") if n == 3 else None)
    made = bench(dead)
    with pytest.raises(EngineDeadError):
        rows_of(made, lambda b: load._closed(b, 2))
    row = made.recorder.document.scenarios[0].rows[0]
    assert row.stopped == "error"
    assert 0 < len(row.samples) < 8


def test_a_camera_drops_what_came_while_it_was_busy() -> None:
    vlm = double()
    made = bench(vlm, load=Load(fps=10.0))
    made.sleep = vlm.clock.sleep
    row = rows_of(made, load.camera)[0]
    # Every answer takes 0.88 s: frames 0, 8, 17, 26, ... are asked about.
    assert row.counts["answered"] == len(row.samples)
    offered, dropped = row.counts["offered"], row.counts["dropped"]
    assert offered is not None and dropped is not None
    assert offered - dropped == len(row.samples)
    assert 7 <= dropped / (len(row.samples) - 1) <= 8
    assert all(0.879 <= (sample.wall_s or 0) < 0.981 for sample in row.samples)


def test_a_camera_slower_than_the_answers_drops_nothing() -> None:
    vlm = double()
    made = bench(vlm, load=Load(fps=1.0))
    made.sleep = vlm.clock.sleep
    row = rows_of(made, load.camera)[0]
    assert row.counts["dropped"] == 0
    assert row.counts["offered"] == len(row.samples)


def test_a_picture_scenario_without_pictures_says_so() -> None:
    from molmo_edge.bench.cases import text_only

    result, _ = ran(double(), names=("camera",), cases=text_only())
    assert "--image" in (result.scenarios[0].error or "")


@pytest.mark.parametrize("wrong", [{"batches": (0,)}, {"users": ()}, {"fps": 0}, {"rates": (-1,)}])
def test_a_load_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BenchmarkError):
        Load(**wrong)


CHILD = """
    import json, os, sys, time
    wanted = json.loads(sys.stdin.read())
    marker = os.path.join(os.environ["VLLM_CACHE_ROOT"], "seen")
    seen = os.path.exists(marker)
    os.makedirs(os.environ["VLLM_CACHE_ROOT"], exist_ok=True)
    open(marker, "w").close()
    print("noise of a library")
    now = time.time()
    sample = {"iteration": 0, "ttft_s": 1.0 if seen else 9.0, "output_tokens": wanted["max_tokens"]}
    print(json.dumps({"running_at": now, "first_token_at": now + 5, "stages": {"build": 3.0},
                      "sample": sample}))
"""


def test_cold_starts_are_fresh_processes_with_caches_of_their_own() -> None:
    vlm = double()
    command = (sys.executable, "-c", textwrap.dedent(CHILD))
    made = bench(vlm, load=Load(starts=2), start_command=command)
    rows = rows_of(made, coldstart.cold_start)
    assert [row.conditions["disk_caches"] for row in rows] == [False, True]
    assert [sample.ttft_s for sample in rows[0].samples] == [9.0]
    assert [sample.ttft_s for sample in rows[1].samples] == [1.0, 1.0]
    assert all(sample.output_tokens == 20 for row in rows for sample in row.samples)
    assert all(5 <= (sample.wall_s or 0) < 60 for row in rows for sample in row.samples)
    assert rows[0].counts["build_s"] == 3.0


def test_a_start_that_fails_is_told_by_its_last_words() -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no such model')")
    rows = rows_of(bench(double(), start_command=command), coldstart.cold_start)
    assert rows[0].samples[0].error == "exit status 1: no such model"


def test_cold_starts_run_without_an_engine() -> None:
    vlm = double()

    def never(caches: bool) -> DoubleVLM:
        raise AssertionError("an engine was opened")

    result = Suite(
        open=never,
        cases=CASES,
        plan=PLAN,
        names=("cold-start",),
        clock=vlm.clock,
        start_command=(sys.executable, "-c", textwrap.dedent(CHILD)),
    ).run()
    assert result.complete


def test_the_childs_line_is_found_among_noise() -> None:
    line = json.dumps({"first_token_at": 1.0})
    assert coldstart._last_line(f"a\n[1]\n{line}\nbye {{") == {"first_token_at": 1.0}
    assert coldstart._last_line("") is None
    assert Sample(iteration=0).wall_s is None
