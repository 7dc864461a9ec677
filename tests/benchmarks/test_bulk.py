"""The comparison of bulk rates: numbers checked by hand, and prepared requests on the fake."""

from __future__ import annotations

import bulk
import pytest

from molmo_edge.engine.fake import FakeEngine
from tests.engine.support import opened

EQUAL = {"batch": 10.0, "prepared": 10.0, "again": 10.0, "generate": 12.5}


def test_rates_are_compared_in_each_round() -> None:
    figures = bulk.evaluate([[EQUAL, {**EQUAL, "again": 8.0}], [EQUAL]], 200)
    assert figures["rates"] == {"batch": 20.0, "prepared": 20.0, "again": 20.0, "generate": 16.0}
    assert figures["of_prepared"]["median"] == figures["floor"]["median"] == 1.0
    assert figures["of_generate"]["median"] == pytest.approx(1.25)
    assert figures["passed"]
    document = {"result": figures, "settings": {"engine": {"model": "demo"}, "images": 200}}
    assert "| demo | 200 | 20 | 1.000 (1.000 to 1.000) |" in bulk.markdown(document)


@pytest.mark.parametrize("slower", [{"batch": 11.0}, {"generate": 9.9}])
def test_a_lower_rate_than_promised_does_not_pass(slower: dict[str, float]) -> None:
    assert not bulk.evaluate([[{**EQUAL, **slower}]], 200)["passed"]


def test_prepared_requests_are_those_of_the_batch() -> None:
    images = bulk.noise(20)
    assert images[0].tobytes() != images[1].tobytes()
    fake = FakeEngine.factory("a b c")
    with opened(fake, max_num_seqs=2) as vlm:
        prepared = bulk.answer_prepared(vlm, images, 2)
        assert fake.calls["render"] == 20 and not fake.calls["add"]
        assert prepared() == bulk.answer_batch(vlm, images, 2)()
        assert len(fake.engine.finished) == 40
