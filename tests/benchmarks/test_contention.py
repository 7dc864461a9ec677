"""contention.py: loads that are what they are called, and shares against the right rounds."""

from __future__ import annotations

import time

import contention
import pytest


@pytest.mark.parametrize("kind", contention.LOADS)
def test_a_load_works_while_it_is_open_and_no_longer(kind: str) -> None:
    load = contention.Load(kind)
    child = load._child
    try:
        time.sleep(0.2)
        assert (load.rounds > 0) == kind.endswith("thread")
        assert (child is not None and child.poll() is None) == (kind == "python process")
    finally:
        load.close()
    done = load.rounds
    time.sleep(0.05)
    assert load.rounds == done
    assert child is None or child.poll() is not None


def test_shares_are_taken_round_by_round() -> None:
    idle = [{"tps": tps, "loops_per_s": 0.0} for tps in (100.0, 200.0, 100.0)]
    busy = [{"tps": tps, "loops_per_s": 30.0} for tps in (50.0, 50.0, 75.0)]
    samples = {"idle": idle, "python thread": busy}
    found = contention._found(samples, "python thread", {"python thread": 60.0})
    assert (found["of_idle"], found["of_idle_min"], found["of_idle_max"]) == (0.5, 0.25, 0.75)
    assert (found["tps"], found["loop_of_alone"]) == (50.0, 0.5)
    assert contention._found(samples, "idle", {})["loop_of_alone"] is None
    table = contention.table({"found": {"thread": {"python thread": found}}})
    assert "| thread | python thread | 50.0 | 0.50 (0.25–0.75) | 0.50 |" in table
