"""Measuring quantisation: memory is seen, settings come back, and results name no folders."""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from pathlib import Path

import pytest
import quantize

RECORDED = Path(quantize.__file__).parent / "results" / "quantize-cpu.json"


def test_memory_that_was_there_for_a_moment_is_counted() -> None:
    with quantize._peaks() as peaks:
        # Not from an allocator, which may have kept as much from before.
        with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            held.write(bytes(64 << 20))
            time.sleep(0.1)
    assert peaks["peak_growth_bytes"] > 60 << 20
    assert peaks["peak_anonymous_growth_bytes"] > 60 << 20


def test_variables_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADE_UP_ONE", "1")
    with quantize._variables({"MADE_UP_ONE": "2", "MADE_UP_TWO": "3"}):
        assert (os.environ["MADE_UP_ONE"], os.environ["MADE_UP_TWO"]) == ("2", "3")
    assert os.environ["MADE_UP_ONE"] == "1"
    assert "MADE_UP_TWO" not in os.environ


def test_folders_are_told_by_their_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--model", "/somebody/secret/Molmo", "--tokens", "8"])
    assert quantize._command() == [
        "python", "benchmarks/quantize.py", "--model", "Molmo", "--tokens", "8"
    ]  # fmt: skip


def test_every_engine_opens_a_way_that_is_quantised() -> None:
    assert {way for way, _ in quantize.ENGINES.values()} <= set(quantize.WAYS)


def test_the_recorded_result_can_be_printed() -> None:
    document = json.loads(RECORDED.read_text(encoding="utf-8"))
    lines = quantize.table(document).splitlines()
    for way in quantize.WAYS:
        assert any(f", {way} |" in line for line in lines)
    for label in ("original", *quantize.ENGINES):
        assert any(f": {label} |" in line for line in lines)
