"""The 2025 table again, and what makes two results not comparable."""

from __future__ import annotations

from typing import Any

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


def test_the_2025_reports_table_comes_out_again_beside_a_new_result() -> None:
    table = compare([*historic(), measured("mine")]).lines
    assert table["mean tok/s (std)"] == ["103.8 (5.0)", "11.1 (3.1)", "22.7 (0.0)"]
    assert table["max tok/s"][:2] == ["108.3", "14.0"]
    for title, mean in (("Boardwalk Photo", "10.7"), ("Complex Plot", "11.3"), ("One", DASH)):
        assert table[f"{title}: mean"][:2] == [DASH, mean]
    assert table["warm-up mean tok/s"] == [DASH, "7.6", DASH]
    assert table["steady mean tok/s"] == [DASH, "13.9", "22.7"]
    assert table["succeeded"] == ["100%"] * 3
    assert table["decode tok/s, steady"][2] == "50.0 [50.0, 50.0]"
    assert table["vLLM"] == ["0.6.3.post1", "0.6.3.post1", "0.32.0"]


def test_ratios_refer_to_the_first_result_and_no_two_have_one_heading() -> None:
    lines = compare([measured("a"), measured("b", speed=lambda n: 100.0)]).lines
    assert lines["decode against first"] == [DASH, "x2.00 [2.00, 2.00]"]
    one = measured("a")
    assert compare([one, one, one]).heads == ["a", "a (2)", "a (3)"]


def test_other_conditions_make_results_not_comparable() -> None:
    one, two = measured("a"), measured("b", cached=16)
    other = measured("c")
    other.environment.device.name = "another"
    assert compare([one, measured("b")]).flags == {}
    assert list(compare([one, other]).flags) == ["power mode"]
    for result in (one, two):
        result.environment.device.power_mode = "MAXN"
    assert compare([one, one.model_copy(update={"label": "c"})]).flags == {}
    two.environment.device.power_mode = "120W"
    two.environment.model.kv_cache_dtype = "auto"
    two.environment.software["vllm"] = "0.31.0"
    two.environment.model.precision = None
    flags = compare([one, two]).details()
    assert "power mode differs (a: MAXN; b: 120W)" in flags
    assert "KV cache differs" in flags and "vLLM differs" in flags
    assert "precision is unknown in b" in flags
    assert "caches differs (a: off; b: off, unproved)" in flags


def test_incomplete_and_slowing_results_are_flagged() -> None:
    slow = measured("slow")
    slow.complete = False
    slow.scenarios[0].rows[0].warmup = document.Warmup(start=2, slowed=True)
    slow.scenarios[0].rows[1].warmup = document.Warmup(start=None, slowed=False)
    flags = compare([slow]).details()
    assert "not comparable: incomplete: slow" in flags
    assert "slow: One slowed down" in flags and "slow: Two never became steady" in flags
