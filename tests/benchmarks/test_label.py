"""The comparison of labelling rates: numbers checked by hand, and all sides on the fake."""

from __future__ import annotations

from pathlib import Path

import label as rates
import pytest

from molmo_edge.engine.fake import FakeEngine
from tests.engine.support import opened

EQUAL = {"label": 10.0, "prepared": 10.0, "again": 10.0, "loop": 12.5}


def test_rates_are_compared_in_each_round() -> None:
    figures = rates.evaluate([[EQUAL, {**EQUAL, "again": 8.0}], [EQUAL]], 200)
    assert figures["rates"] == {"label": 20.0, "prepared": 20.0, "again": 20.0, "loop": 16.0}
    assert figures["of_loop"]["median"] == pytest.approx(1.25) and figures["passed"]
    document = {
        "result": {"rate": figures},
        "settings": {"engine": {"model": "demo"}, "images": 200},
    }
    assert "| demo | 200 | 20 | 1.000 (1.000 to 1.000) |" in rates.markdown(document)


@pytest.mark.parametrize("slower", [{"label": 11.0}, {"loop": 11.0}])
def test_a_lower_rate_than_promised_does_not_pass(slower: dict[str, float]) -> None:
    assert not rates.evaluate([[{**EQUAL, **slower}]], 200)["passed"]


def test_every_side_answers_about_every_file(tmp_path: Path) -> None:
    rates.write_images(tmp_path, 6)
    files = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert len(set(files)) == 6
    with opened(FakeEngine.factory("a b c"), max_num_seqs=2) as vlm:
        assert [rates.PREPARE[side](vlm, tmp_path, 2)() for side in rates.SIDES] == [6] * 4
    rates.write_images(tmp_path, 6, broken=(2,))
    with opened(FakeEngine.factory("a b c"), max_num_seqs=2) as vlm:
        assert rates.answer_label(vlm, tmp_path, 2)() == 5
