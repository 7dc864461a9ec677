"""The tables and the page: complete, and escaped."""

from __future__ import annotations

import pytest

from molmo_edge.bench import report
from molmo_edge.bench.document import Answer, Ceiling, Document, Scenario
from molmo_edge.bench.measure import RunOptions
from tests.bench.double import DoubleVLM, measure


@pytest.fixture(scope="module")
def full() -> Document:
    result = measure(
        DoubleVLM(speed=lambda n: 20.0 if n < 5 else 50.0),
        *("report", "throughput", "camera"),
        options=RunOptions(iterations=10, max_iterations=12, max_tokens=20, batches=(1, 2)),
    )
    row = result.scenarios[0].rows[0]
    row.ceiling = Ceiling(bytes_per_token=4e9, bandwidth_share=0.75, joules_per_token=4.5)
    row.answer = Answer(text="# <b>\n| a |", expected=["1", "2"], matched=1)
    return result


def test_every_column_is_shown_where_something_is_known(full: Document) -> None:
    tables = [report.grid(scenario).splitlines()[0] for scenario in full.scenarios]
    heads = {head.strip() for line in tables for head in line.strip("| ").split("|")}
    assert heads == set(report.COLUMNS)
    assert "itl ms" not in report.terminal(full)
    phases = report.phases(full.scenarios[0])
    assert "| One | warm-up | output_tps | 4 | 20.0 |" in phases
    assert "| One | steady | output_tps |" in phases


def test_the_page_holds_every_row_and_answer(full: Document) -> None:
    text = report.markdown(full)
    assert text.startswith("# Benchmark double") and "random weights" in text
    assert "vLLM 0.32.0, torch 2.13.0+cpu, transformers 5.17.0" in text
    assert "| One | " in text and "1 of 2 known values" in text and "frames dropped" in text
    assert "\n    # <b>\n    | a |\n" in text  # an answer is a code block


def test_incomplete_and_empty_results_make_a_page() -> None:
    empty = Document(created="now", scenarios=[Scenario(name="report", title="R")])
    empty.notes = ["interrupted: what was measured until then is kept"]
    text = report.markdown(empty)
    assert "## R" in text and "This result is incomplete." in text and "interrupted" in text
