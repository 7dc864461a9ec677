"""The standard pictures, the user's own, sweeps, and copies that no cache knows."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from molmo_edge.bench import cases
from molmo_edge.errors import BenchmarkError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_cases.py"


def test_the_three_cases_have_their_pictures_and_the_chart_its_answers() -> None:
    found = cases.standard()
    assert [case.name for case in found] == ["boardwalk", "panels", "linechart"]
    assert all(case.image is not None and case.image.size == (1024, 768) for case in found)
    assert all(case.image is not None and case.image.mode == "RGB" for case in found)
    assert found[2].expected == ("10", "15", "25", "40", "55", "70", "85")


def test_the_shipped_pictures_are_small() -> None:
    data = resources.files("molmo_edge.bench").joinpath("data")
    pictures = [item for item in data.iterdir() if item.name.endswith((".png", ".jpg"))]
    assert len(pictures) == 3
    assert sum(len(item.read_bytes()) for item in pictures) < 400_000


@pytest.mark.slow
def test_the_script_draws_the_shipped_pictures(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], check=True)
    for case, name in zip(
        cases.standard(), ("boardwalk.jpg", "panels.png", "linechart.png"), strict=True
    ):
        assert case.image is not None
        with Image.open(tmp_path / name) as drawn:
            difference = ImageChops.difference(drawn.convert("RGB"), case.image)
        # Fonts and codecs of other Pillow versions may move an edge by a shade.
        shades = difference.convert("L").histogram()
        assert sum(shades[32:]) < 0.01 * 1024 * 768


def test_the_right_answer_on_the_chart_is_what_was_drawn() -> None:
    namespace: dict[str, object] = {"__name__": "drawn", "__file__": str(SCRIPT)}
    exec(compile(SCRIPT.read_text(encoding="utf-8"), str(SCRIPT), "exec"), namespace)
    solar = namespace["SOLAR"]
    assert isinstance(solar, tuple)
    assert tuple(str(value) for value in solar) == cases.standard()[2].expected


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_fresh_copies_all_differ_and_leave_the_original_alone(mode: str) -> None:
    image = Image.new(mode, (4, 3))
    before = image.tobytes()
    copies = {cases.fresh(image, n).tobytes() for n in (1, 2, 255, 256, 65536, 2**24 - 1)}
    assert len(copies) == 6
    assert image.tobytes() == before
    assert cases.fresh(image, 1).size == (4, 3)


def test_own_pictures_get_distinct_names(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        path = tmp_path / folder / "mug.png"
        path.parent.mkdir()
        Image.new("RGB", (20, 10)).save(path)
        paths.append(path)
    found = cases.own(paths, "What?")
    assert [case.name for case in found] == ["mug-1", "mug-2"]
    assert {case.question for case in found} == {"What?"}


def test_a_picture_that_fails_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(BenchmarkError, match=r"bad\.png"):
        cases.own([bad])
    with pytest.raises(BenchmarkError, match=r"gone\.png"):
        cases.own([tmp_path / "gone.png"])


def test_a_sweep_has_every_size_with_every_number_of_crops() -> None:
    case = cases.standard()[0]
    found = cases.swept([case], [(64, 48), (32, 24)], [1, 4])
    assert [one.name for one in found] == [
        "boardwalk-64x48-crops1",
        "boardwalk-64x48-crops4",
        "boardwalk-32x24-crops1",
        "boardwalk-32x24-crops4",
    ]
    assert [one.image.size for one in found if one.image] == [(64, 48)] * 2 + [(32, 24)] * 2
    assert [one.max_crops for one in found] == [1, 4, 1, 4]
    assert cases.swept([case]) == (case,)
    text = cases.text_only()
    assert cases.swept(text, [(64, 48)], [1]) == text


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("10, 15, 25, 40", 4),
        ("In 2018 it was 10, in 2019 15, then 25 and finally 40.0 TWh.", 4),
        ("40, 25, 15, 10", 1),
        ("10 then 20 then 25", 2),
        ("No idea.", 0),
    ],
)
def test_known_values_count_in_their_order(answer: str, right: int) -> None:
    assert cases.matched(("10", "15", "25", "40"), answer) == right


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_matching_survives_any_answer(answer: str) -> None:
    assert 0 <= cases.matched(("10", "15"), answer) <= 2
