"""The cost of our own code: both sides do the same work."""

from __future__ import annotations

import own_cost

from molmo_edge.engine.fake import FakeEngine
from tests.engine.support import opened


def test_both_sides_generate_the_same() -> None:
    factory = FakeEngine.factory(own_cost.ANSWER)
    alone = factory()
    own_cost.fake_s(alone, 2, 5)
    steps = factory.calls["step"]
    with opened(factory) as vlm:
        own_cost.wrapped_s(vlm, 2, 5)
        assert factory.calls["step"] == 2 * steps == 20
        assert factory.calls["add"] == factory.calls["render"] == 4


def test_the_document_has_a_cost_for_each_promise() -> None:
    document = own_cost.run(rounds=3, tokens=5, requests=2)
    assert document["result"]["token_us"]["count"] == len(document["rounds"]["ours"]["token_us"])
    assert own_cost.markdown(document["result"]).count("\n") == 3
