"""The tables, the pages and the plots: complete, self-contained and escaped."""

from __future__ import annotations

import re
import sys

import pytest

from molmo_edge.bench import plots, report
from molmo_edge.bench.document import Answer, Ceiling, Document, Scenario, Warmup
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


def test_the_html_page_is_self_contained_and_escaped_with_every_plot(full: Document) -> None:
    pytest.importorskip("matplotlib")
    full.scenarios[0].rows[0].answer = Answer(text="<script>alert(1)</script> & <b>")
    page = report.html([*historic(), full])
    assert "<script" not in page and not re.search(r"(?:href|src)=\"(?!#)|url\((?!#)|@import", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in page
    for name in plots.PLOTS:
        assert f'<figure id="{name}"><svg' in page
    assert plots.figures(historic()[1:]) == {}
    # On a phone: the first column stays, and one line says what is not comparable.
    assert "td:first-child { position: sticky; left: 0;" in page
    assert "<summary>Not comparable: power mode, vLLM, " in page


def test_charts_say_what_is_drawn_of_which_weights_and_what_is_not_steady(full: Document) -> None:
    pytest.importorskip("matplotlib")
    trained = full.model_copy(deep=True, update={"label": "trained"})
    trained.environment.model.random_weights = False
    row = trained.scenarios[0].rows[0]
    row.warmup = Warmup(start=None, slowed=False)
    for documents, mark in (
        ([full], "\nrandom weights"),
        ([trained, full], "\nrandom weights: a test"),
        ([trained], None),
    ):
        drawn = plots.figures(documents)
        titles = [figure.axes[0].get_title() for figure, _ in drawn.values()]
        assert all(title.endswith(mark) if mark else "random" not in title for title in titles)
    [axes] = drawn["speed"][0].axes
    assert "One, never became steady" in axes.get_legend_handles_labels()[1]
    assert "One: never became steady" in report.markdown(trained)
    assert "Hollow" in drawn["speed"][1] and "Prefill includes" in drawn["waterfall"][1]
    even = measure(DoubleVLM())
    assert plots.figures([even])["speed"][1] == "Each point is a request, sent alone."


def test_a_sentence_says_what_was_measured(full: Document) -> None:
    said = report.sentence(full)
    assert re.match(r"\d+ requests to double \(random weights: .* on a test, answers of at", said)
    assert said.endswith("20 tokens: One request at a time; Throughput in fixed batches; "
                         "Concurrent users; A camera's newest frame.")  # fmt: skip
    for page in (report.terminal(full), report.markdown(full), report.quick(full)):
        assert said.replace("|", "\\|") in page


def test_without_matplotlib_the_extra_is_named(
    full: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"molmo-edge\[plot\]"):
        report.html([full])
