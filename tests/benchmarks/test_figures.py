"""Every figure of the pages comes from a recorded result or from the plan."""

from __future__ import annotations

import re

import figures
import pytest

PAGES = [*figures.PAGES, *sorted((figures.ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", figures.PAGES, ids=lambda path: str(path.parent.name))
def test_the_figures_of_a_page_are_those_of_the_recorded_results(path: figures.Path) -> None:
    page = path.read_text("utf-8")
    assert figures.BLOCK.search(page)
    assert figures.render(page) == page, "run: python benchmarks/figures.py"


def test_a_page_that_differs_is_seen_and_written_anew() -> None:
    page = figures.PAGES[0].read_text("utf-8")
    assert "| 33.5 |" in page
    assert figures.render(page.replace("| 33.5 |", "| 35.0 |")) == page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_page_has_a_measured_figure_of_another_origin(path: figures.Path) -> None:
    page = re.sub(r"```.*?```", "", figures.BLOCK.sub("", path.read_text("utf-8")), flags=re.DOTALL)
    unit = r"tok/s|tokens per second|GB/s|µs|ms\b|%|times as|times faster|J/token"
    allowed = {"100 µs", "0.97"}  # promises that a script checks
    assert set(re.findall(rf"\d[\d.,]* ?(?:{unit})", page)) <= allowed
    assert not re.findall(r"\d(?:\.\d+)?e-\d", page.replace("to 1e-4", ""))
