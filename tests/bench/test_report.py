"""The tables, the pages and the plots: complete, self-contained and escaped."""

from __future__ import annotations

import csv
import io
import json
import re
import sys

import pytest

from molmo_edge.bench import plots, report
from molmo_edge.bench.document import Answer, Ceiling, Document, Scenario
from molmo_edge.bench.measure import RunOptions
from molmo_edge.errors import MissingDependencyError
from tests.bench.double import DoubleVLM, measure
from tests.bench.test_compare import historic


@pytest.fixture(scope="module")
def full() -> Document:
    result = measure(
        DoubleVLM(speed=lambda n: 20.0 if n < 5 else 50.0),
        *("report", "throughput", "concurrency", "camera"),
        options=RunOptions(iterations=10, max_iterations=12, max_tokens=20, batches=(1, 2)),
    )
    result.environment.device.memory_bandwidth_bytes_s = 273e9
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


def test_csv_and_json_lines_hold_every_row(full: Document) -> None:
    count = sum(len(scenario.rows) for scenario in full.scenarios)
    records = list(csv.DictReader(io.StringIO(report.csv_text(full))))
    assert len(records) == count and records[0]["case"] == "one"
    lines = report.json_lines(full).splitlines()
    assert len(lines) == count and json.loads(lines[0])["bandwidth_share"] == 0.75


def test_the_html_page_is_self_contained_and_escaped_with_every_plot(full: Document) -> None:
    pytest.importorskip("matplotlib")
    full.scenarios[0].rows[0].answer = Answer(text="<script>alert(1)</script> & <b>")
    page = report.html([*historic(), full])
    assert "<script" not in page and not re.search(r"(?:href|src)=\"(?!#)|url\((?!#)|@import", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in page
    for name in plots.PLOTS:
        assert f'<figure id="{name}"><svg' in page
    assert plots.figures(historic()[1:]) == {}


def test_without_matplotlib_the_extra_is_named(
    full: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"molmo-edge\[plot\]"):
        report.html([full])
