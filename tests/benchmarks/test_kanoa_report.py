"""The report's questions through kanoa, on the fake, beside the figures of 2025."""

from __future__ import annotations

from pathlib import Path

import kanoa_report as script

from molmo_edge import EdgeVLM
from molmo_edge.bench.cases import standard
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.integrations.kanoa import interpreter

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_three_cases_are_asked_and_stand_beside_the_report() -> None:
    fake = FakeEngine.factory("one two three", step_s=0.001)
    with EdgeVLM(engine=fake) as vlm:
        speeds = script.measure(interpreter(vlm), standard(), 2)
    assert fake.engine.prompts == [case.question for case in standard()] * 2
    assert all(len(values) == 2 and min(values) > 0 for values in speeds.values())
    report = script.reported(RESULTS / "2025-12-08-thor.json")
    assert report == {"all": 11.1, "steady": 13.9}
    shown = script.markdown({"boardwalk": [1.0, 2.0, 4.0], "panels": [3.0]}, report)
    assert "| Boardwalk Photo | 1.0 | 3.0 | – |" in shown
    assert "| all | – | 2.5 | 11.1 |" in shown and "| all but the first | – | 3.0 | 13.9 |" in shown
    assert script.reported(None) == {}
