"""The 2025 table again, and what makes two results unlike."""

from __future__ import annotations

from pathlib import Path

from molmo_edge.bench import document, store
from molmo_edge.bench.compare import compare, head_names
from molmo_edge.bench.document import Document
from molmo_edge.bench.measure import Plan
from molmo_edge.bench.suite import Suite
from tests.bench.double import DoubleVLM
from tests.bench.test_suite import CASES, double

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def historic() -> list[Document]:
    return [store.load(RESULTS / f"2025-12-08-{name}.json") for name in ("rtx5080", "thor")]


def measured(vlm: DoubleVLM, label: str) -> Document:
    plan = Plan(iterations=6, max_iterations=6, max_tokens=20)
    suite = Suite(open=lambda c: vlm, cases=CASES, plan=plan, clock=vlm.clock, label=label)
    return suite.run()


def test_the_2025_reports_table_comes_out_again() -> None:
    lines = {line[0]: line[1:] for line in compare(historic()).lines}
    assert lines["mean tok/s (std)"] == ("103.8 (5.0)", "11.1 (3.1)")
    assert lines["max tok/s"] == ("108.3", "14.0")
    dash = "\N{EN DASH}"
    assert lines["Boardwalk Photo: mean"] == (dash, "10.7")
    assert lines["Boardwalk Photo: max"] == (dash, "13.9")
    assert lines["Complex Plot: mean"] == (dash, "11.3")
    assert lines["Complex Plot: max"] == (dash, "14.2")
    assert lines["Data Interpretation: mean"] == (dash, "11.3")
    assert lines["Data Interpretation: max"] == (dash, "14.2")
    assert lines["warm-up mean tok/s"] == (dash, "7.6")
    assert lines["steady mean tok/s"] == (dash, "13.9")
    assert lines["succeeded"] == ("100%", "100%")


def test_a_result_of_ours_stands_beside_the_historic_ones() -> None:
    found = compare([*historic(), measured(double(), "mine")])
    lines = {line[0]: line[1:] for line in found.lines}
    assert lines["mean tok/s (std)"][2] == "22.7 (0.0)"
    assert lines["decode tok/s, steady"][2] == "50.0 [50.0, 50.0]"
    assert lines["vLLM"] == ("0.6.3.post1", "0.6.3.post1", "0.32.0")


def test_unlike_conditions_are_flagged() -> None:
    one, two = measured(double(), "a"), measured(double(cached=16), "b")
    for result in (one, two):
        result.environment.device.power_mode = "MAXN"
    assert compare([one, one.model_copy(update={"label": "c"})]).flags == ()
    two.environment.device.power_mode = "120W"
    two.environment.model.kv_cache_dtype = "auto"
    two.environment.software.vllm = "0.31.0"
    two.environment.model.precision = None
    flags = "\n".join(compare([one, two]).flags)
    assert "power mode differs (a: MAXN; b: 120W)" in flags
    assert "KV cache differs" in flags
    assert "vLLM differs" in flags
    assert "precision is unknown in b" in flags
    assert "caches differs (a: off; b: off, unproved)" in flags


def test_an_unknown_power_mode_is_flagged_even_when_unknown_everywhere() -> None:
    flags = compare([measured(double(), "a")]).flags
    assert flags == ("power mode is unknown in a",)


def test_incomplete_and_slowing_results_are_flagged() -> None:
    slow = measured(double(speed=lambda n: 50.0 if n < 5 else 30.0), "slow")
    slow.complete = False
    slow.scenarios[0].rows[0].warmup = document.Warmup(start=2, levels=[], slowed=True)
    flags = "\n".join(compare([slow]).flags)
    assert "slow is incomplete" in flags
    assert "slow: One slowed down" in flags


def test_the_ratio_refers_to_the_first_result() -> None:
    fast = measured(double(speed=lambda n: 100.0), "fast")
    found = compare([measured(double(), "base"), fast])
    lines = {line[0]: line[1:] for line in found.lines}
    assert lines["decode against first"][1] == "x2.00 [2.00, 2.00]"


def test_columns_never_share_a_heading() -> None:
    one = measured(double(), "a")
    assert head_names([one, one, one]) == ("a", "a (2)", "a (3)")


def test_the_comparison_as_markdown_has_its_flags() -> None:
    text = compare(historic()).markdown()
    assert text.startswith("|  | RTX 5080 (2025) | Jetson Thor (2025) |\n| --- | --- | --- |\n")
    assert "- not alike: power mode is unknown in RTX 5080 (2025), Jetson Thor (2025)" in text
