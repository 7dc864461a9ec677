"""The report's questions through kanoa, on the fake, beside the figures of 2025."""

from __future__ import annotations

from pathlib import Path

import kanoa_report as script

from molmo_edge import EdgeVLM
from molmo_edge.bench.cases import standard
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.integrations.kanoa import interpreter

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_three_cases_are_asked_and_every_request_is_measured() -> None:
    fake = FakeEngine.factory("one two three", step_s=0.001)
    with EdgeVLM(engine=fake) as vlm:
        requests = script.measure(interpreter(vlm), standard(), 2)
    assert fake.engine.prompts == [case.question for case in standard()] * 2
    for asked in requests.values():
        assert [one["output_tokens"] for one in asked] == [4, 4]  # three words and the end
        assert all(one["input_tokens"] > 4 and one["seconds"] > 0.004 for one in asked)


def test_the_table_has_first_and_later_requests_beside_the_report() -> None:
    requests = {
        case.name: [{"output_tokens": tokens, "seconds": 10.0} for tokens in (10, 20, 60)]
        for case in standard()
    }
    shown = script.markdown(requests, script.reported(RESULTS / "2025-12-08-thor.json"))
    assert "| Boardwalk Photo | 10 to 60 | 1.0 | 4.0 | 3.0 | 10.7 | – |" in shown
    assert "| all cases | 10 to 60 | 1.0 | 4.0 | 3.0 | 11.1 | 13.9 |" in shown
    once = {name: asked[:1] for name, asked in requests.items()}
    alone = script.markdown(once, script.reported(None))
    assert "| all cases | 10 | 1.0 | 1.0 |" in alone and "2025" not in alone
