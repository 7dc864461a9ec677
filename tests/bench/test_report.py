"""The page and the plots: self-contained, escaped, and readable in a browser of any width."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from molmo_edge.bench import document, plots, report
from molmo_edge.bench.document import Answer, Ceiling, Document
from molmo_edge.bench.measure import Plan
from molmo_edge.bench.scenarios import Load
from molmo_edge.bench.suite import Suite
from molmo_edge.errors import MissingDependencyError
from tests.bench.test_compare import historic
from tests.bench.test_suite import CASES, double

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(scope="module")
def full() -> Document:
    vlm = double(speed=lambda n: 20.0 if n < 5 else 50.0)
    result = Suite(
        open=lambda c: vlm,
        cases=CASES,
        plan=Plan(iterations=10, max_iterations=12, max_tokens=20),
        names=("report", "throughput"),
        load=Load(batches=(1, 2)),
        clock=vlm.clock,
    ).run()
    result.environment.device.bandwidth_bytes_per_s = 273e9
    row = result.scenarios[0].rows[0]
    row.ceiling = Ceiling(bytes_per_token=4e9, bandwidth_share=0.75)
    row.answer = Answer(text="<script>alert(1)</script> & <b>")
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


def test_the_page_fetches_nothing_and_runs_nothing(page: str) -> None:
    links = Links()
    links.feed(page)
    assert "script" not in links.tags
    assert all(target.startswith("#") for target in links.targets)
    assert not re.search(r"url\((?!#)|@import", page)


def test_answers_are_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in page


def test_every_plot_with_something_to_show_is_there(page: str, full: Document) -> None:
    assert set(plots.figures([*historic(), full])) == set(plots.PLOTS)
    for name in plots.PLOTS:
        assert f'<figure id="{name}"><svg' in page
    assert plots.figures(historic()[1:]) == {}


def test_the_versions_stand_on_the_page(page: str) -> None:
    assert "vLLM 0.32.0, torch 2.13.0+cpu, transformers 5.17.0" in page
    assert "random weights" in page


def test_the_warm_up_is_drawn_apart(full: Document) -> None:
    figure = plots.speed([full])
    assert figure is not None
    hollow = [
        line
        for line in figure.axes[0].lines
        if line.get_marker() == "o" and line.get_markerfacecolor() == "white"
    ]
    assert [len(line.get_xdata()) for line in hollow] == [4]


def test_plots_are_the_same_every_time(full: Document) -> None:
    assert plots.svg(plots.speed([full])) == plots.svg(plots.speed([full]))


def test_plots_become_png_files(full: Document, tmp_path: Path) -> None:
    path = tmp_path / "new" / "speed.png"
    plots.png(plots.speed([full]), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(
    full: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"molmo-edge\[plot\]"):
        report.html([full])


def test_incomplete_results_say_so(full: Document) -> None:
    partial = full.model_copy(deep=True)
    partial.complete = False
    partial.notes = ["interrupted: what was measured until then is kept"]
    text = report.html([partial])
    assert "This result is incomplete." in text
    assert "interrupted" in text


def test_a_result_without_any_sample_still_makes_a_page() -> None:
    empty = Document(created="now", scenarios=[document.Scenario(name="report", title="R")])
    assert "<h2>R</h2>" in report.html([empty])


MEASURE = """<script>
const root = document.documentElement;
const text = [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width);
document.title = [root.scrollWidth, root.clientWidth, Math.max(...text), text.length].join(' ');
</script>"""


@pytest.fixture
def browser() -> Iterator[str]:
    if BROWSER is None:
        pytest.skip("no headless browser here")
    yield BROWSER


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_lays_the_page_out_without_sideways_scrolling(
    browser: str, page: str, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},1200",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<title>([\d.]+) ([\d.]+) ([\d.]+) (\d+)</title>", done.stdout)
    assert found is not None
    scroll, client, widest, count = (float(part) for part in found.groups())
    assert abs(client - width) <= 20
    assert scroll <= client
    assert count == len(plots.PLOTS)
    assert 0.3 * client < widest <= client
