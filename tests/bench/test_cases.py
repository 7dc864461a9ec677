"""The standard images, the user's own, sweeps, and copies that no cache has seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from molmo_edge.bench import cases
from molmo_edge.errors import BenchmarkError


def test_the_three_cases_have_their_images_and_the_chart_its_answers() -> None:
    standard = cases.standard()
    assert [case.name for case in standard] == ["boardwalk", "panels", "linechart"]
    assert all(case.image is not None and case.image.size == (1024, 768) for case in standard)
    assert standard[2].expected == ("10", "15", "25", "40", "55", "70", "85")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_fresh_copies_all_differ_and_leave_the_original_alone(mode: str) -> None:
    image = Image.new(mode, (4, 3))
    before = image.tobytes()
    copies = {cases.fresh(image, n).tobytes() for n in (1, 2, 255, 256, 65536, 2**24 - 1)}
    assert len(copies) == 6 and image.tobytes() == before


def test_own_images_get_distinct_names_and_bad_ones_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "mug.png", tmp_path / "b" / "mug.png"]
    for path in paths:
        path.parent.mkdir()
        Image.new("RGB", (20, 10)).save(path)
    own = cases.own(paths, "What?")
    assert [(case.name, case.question) for case in own] == [("mug-1", "What?"), ("mug-2", "What?")]
    paths[0].write_bytes(b"no image")
    with pytest.raises(BenchmarkError, match=r"mug\.png"):
        cases.own(paths)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("In 2018 it was 10, in 2019 15, then 25 and finally 40.0 TWh.", 4),
        ("40, 25, 15, 10", 1),
        ("10 then 20 then 25", 2),
        ("No idea. 1.2.3 ٣ 1e9 ..", 0),
    ],
)
def test_known_values_count_in_their_order(answer: str, right: int) -> None:
    assert cases.count_matches(("10", "15", "25", "40"), answer) == right
