"""The 2025 table again, and what makes two results not comparable."""

from __future__ import annotations

from typing import Any

from molmo_edge.bench import compare as comparing
from molmo_edge.bench import document
from molmo_edge.bench.compare import compare
from molmo_edge.bench.document import Document
from molmo_edge.bench.measure import RunOptions
from tests.bench.double import DoubleVLM, measure
from tests.bench.test_document import RESULTS

DASH = "\N{EN DASH}"


def historic() -> list[Document]:
    return [document.load(RESULTS / f"2025-12-08-{name}.json") for name in ("rtx5080", "thor")]


def measured(label: str, **double: Any) -> Document:
    options = RunOptions(iterations=6, max_iterations=6, max_tokens=20)
    return measure(DoubleVLM(**double), options=options, label=label)


def lines(*documents: Document) -> dict[str, list[str]]:
    return {line[0]: list(line[1:]) for line in compare(documents).table.lines}


def test_the_2025_reports_table_comes_out_again() -> None:
    table = lines(*historic())
    assert table["mean tok/s (std)"] == ["103.8 (5.0)", "11.1 (3.1)"]
    assert table["max tok/s"] == ["108.3", "14.0"]
    for title, mean, maximum in (
        ("Boardwalk Photo", "10.7", "13.9"),
        ("Complex Plot", "11.3", "14.2"),
        ("Data Interpretation", "11.3", "14.2"),
    ):
        assert table[f"{title}: mean"] == [DASH, mean]
        assert table[f"{title}: max"] == [DASH, maximum]
    assert table["warm-up mean tok/s"] == [DASH, "7.6"]
    assert table["steady mean tok/s"] == [DASH, "13.9"]
    assert table["succeeded"] == ["100%", "100%"]


def test_a_new_result_stands_beside_the_historic_ones() -> None:
    table = lines(*historic(), measured("mine"))
    assert table["mean tok/s (std)"][2] == "22.7 (0.0)"
    assert table["decode tok/s, steady"][2] == "50.0 [50.0, 50.0]"
    assert table["vLLM"] == ["0.6.3.post1", "0.6.3.post1", "0.32.0"]
    assert lines(measured("a"), measured("b", speed=lambda n: 100.0))["decode against first"] == [
        DASH,
        "x2.00 [2.00, 2.00]",
    ]


def test_other_conditions_make_results_not_comparable() -> None:
    one, two = measured("a"), measured("b", cached=16)
    for result in (one, two):
        result.environment.device.power_mode = "MAXN"
    assert compare([one, one.model_copy(update={"label": "c"})]).flags == ()
    two.environment.device.power_mode = "120W"
    two.environment.model.kv_cache_dtype = "auto"
    two.environment.software.vllm = "0.31.0"
    two.environment.model.precision = None
    flags = "\n".join(compare([one, two]).flags)
    assert "power mode differs (a: MAXN; b: 120W)" in flags
    assert "KV cache differs" in flags and "vLLM differs" in flags
    assert "precision is unknown in b" in flags
    assert "caches differs (a: off; b: off, unproved)" in flags


def test_an_unknown_power_mode_incomplete_and_slowing_results_are_flagged() -> None:
    assert compare([measured("a")]).flags == ("power mode is unknown in a",)
    slow = measured("slow", speed=lambda n: 50.0 if n < 5 else 30.0)
    slow.complete = False
    slow.scenarios[0].rows[0].warmup = document.Warmup(start=2, levels=[], slowed=True)
    slow.scenarios[0].rows[1].warmup = None
    flags = "\n".join(compare([slow]).flags)
    assert "slow is incomplete" in flags
    assert "slow: One slowed down" in flags and "slow: Two never became steady" in flags


def test_columns_never_share_a_heading() -> None:
    one = measured("a")
    assert comparing.head_names([one, one, one]) == ("a", "a (2)", "a (3)")


def test_the_comparison_as_markdown_has_its_flags() -> None:
    text = compare(historic()).markdown()
    assert text.startswith("|  | RTX 5080 (2025) | Jetson Thor (2025) |\n| --- | --- | --- |\n")
    assert "- not comparable: power mode is unknown in RTX 5080 (2025), Jetson Thor" in text
