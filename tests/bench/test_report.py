"""The tables, the page and the plots: complete, self-contained and escaped."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from molmo_edge.bench import plots, report
from molmo_edge.bench.document import Answer, Ceiling, Document, Scenario
from molmo_edge.bench.measure import RunOptions
from molmo_edge.errors import MissingDependencyError
from tests.bench.double import DoubleVLM, FakeClock, measure
from tests.bench.test_compare import historic

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def full() -> Document:
    result = measure(
        DoubleVLM(FakeClock(tick=0.001), speed=lambda n: 20.0 if n < 5 else 50.0),
        *("report", "throughput", "camera"),
        options=RunOptions(iterations=10, max_iterations=12, max_tokens=20, batches=(1, 2)),
    )
    result.environment.device.bandwidth_bytes_per_s = 273e9
    row = result.scenarios[0].rows[0]
    row.ceiling = Ceiling(bytes_per_token=4e9, bandwidth_share=0.75, joules_per_token=4.5)
    row.answer = Answer(text="<script>alert(1)</script> & <b>", expected=["1", "2"], matched=1)
    return result


@pytest.fixture(scope="module")
def page(full: Document) -> str:
    return report.html([*historic(), full])


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value or "" for name, value in attrs if name.endswith(("href", "src"))]


def test_every_column_is_shown_where_something_is_known(full: Document) -> None:
    tables = [report.grid(scenario).splitlines()[0] for scenario in full.scenarios]
    heads = {head.strip() for line in tables for head in line.strip("| ").split("|")}
    assert heads == {column.head for column in report.COLUMNS}
    assert heads == {
        *("case", "n", "steady", "since due s", "preproc ms", "ttft ms", "ttft p99", "itl ms"),
        *("itl p99", "decode tok/s", "request tok/s", "total tok/s", "of bandwidth", "J/token"),
        "caches",
    }
    assert "itl ms" not in report.grid(full.scenarios[0], narrow=True)
    phases = report.phases(full.scenarios[0])
    assert "| One | warm-up | output_tps | 4 | 20.0 |" in phases
    assert "| One | steady | output_tps |" in phases


def test_markdown_csv_and_json_lines_hold_every_row(full: Document) -> None:
    text = report.markdown(full)
    assert text.startswith("# Benchmark double") and "random weights" in text
    assert "| One | " in text and "1 of 2 known values" in text and "frames dropped" in text
    records = list(csv.DictReader(io.StringIO(report.render(full, "csv"))))
    assert [record["case"] for record in records] == ["one", "two", "one", "one", "one"]
    assert json.loads(report.render(full, "jsonl").splitlines()[0])["bandwidth_share"] == 0.75
    assert json.loads(report.render(full, "json"))["format"] == "molmo-edge-bench"


def test_the_page_has_no_external_resource_and_no_script(page: str) -> None:
    links = Links()
    links.feed(page)
    assert "script" not in links.tags
    assert all(target.startswith("#") for target in links.targets)
    assert not re.search(r"url\((?!#)|@import", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in page
    assert "vLLM 0.32.0, torch 2.13.0+cpu, transformers 5.17.0" in page and "random weights" in page


def test_every_plot_with_something_to_show_is_on_the_page(page: str, full: Document) -> None:
    for name in plots.PLOTS:
        assert f'<figure id="{name}"><svg' in page
    assert plots.figures(historic()[1:]) == {}
    speed, again = (plots.figures([full])["speed"] for _ in range(2))
    assert plots.svg(speed) == plots.svg(again)
    hollow = [
        line
        for line in speed.axes[0].lines
        if line.get_marker() == "o" and line.get_markerfacecolor() == "white"
    ]
    assert [len(line.get_xdata()) for line in hollow] == [4]


def test_without_matplotlib_the_extra_is_named(
    full: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"molmo-edge\[plot\]"):
        report.html([full])


def test_incomplete_and_empty_results_make_a_page() -> None:
    empty = Document(created="now", scenarios=[Scenario(name="report", title="R")])
    empty.notes = ["interrupted: what was measured until then is kept"]
    text = report.html([empty])
    assert "<h2>R</h2>" in text and "This result is incomplete." in text and "interrupted" in text
