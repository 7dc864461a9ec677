"""Answers of a Molmo model become points, whatever state the text is in."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from molmo_edge.errors import ImageError, InputError
from molmo_edge.images import load
from molmo_edge.points import Point, PointResult, TrackPoint, TrackResult, parse_points
from molmo_edge.video import Clip, VideoLimits, load_video
from tests.image_files import encode, exif, stored

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "molmo2" / "golden_extra.json").read_text(encoding="utf-8"))
CORPUS: dict[str, dict[str, Any]] = {
    f"{path.stem}: {case['name']}": case
    for path in sorted((DATA / "pointing").glob("*.json"))
    for case in json.loads(path.read_text(encoding="utf-8"))
}
TEXTS = [case["text"] for case in CORPUS.values()]
MUG = '<point x="61.5" y="40.4" alt="mug">mug</point>'
EVERYTHING = {
    "points": (), "stated_count": None, "consistent": None, "none_found": False,
    "truncated": False, "malformed": 0,
}  # fmt: skip


# Whole answers


@pytest.mark.parametrize("case", CORPUS.values(), ids=CORPUS.keys())
def test_every_known_answer_is_read_as_expected(case: dict[str, Any]) -> None:
    expected = EVERYTHING | {key: case[key] for key in EVERYTHING if key in case}
    expected["points"] = tuple(Point(**point) for point in case.get("points", ()))
    result = parse_points(case["text"])
    assert {key: getattr(result, key) for key in EVERYTHING} == expected
    assert result.text == case["text"] and result.count == len(expected["points"])


def test_json_and_equality_leave_the_image_out() -> None:
    text = MUG.replace(">mug<", ">caf\u00e9 \ud800<") + " shows a total of 2."
    parsed = parse_points(text)
    result = replace(parsed, images=(Image.new("RGB", (8, 8)),))
    assert result == parsed and hash(result) == hash(parsed) and "images=" not in repr(result)
    written = result.to_json()
    assert written.isascii() and "\n" not in written
    point = {"x": 0.615, "y": 0.404, "label": "caf\u00e9 \ud800", "alt": "mug", "id": None}
    assert json.loads(written) == result.as_dict() == {
        "label": "",
        "text": text,
        "points": [point | {"image_index": None, "t": None, "frame": None}],
        "count": 1,
        "stated_count": 2,
        "consistent": False,
        "none_found": False,
        "truncated": False,
        "malformed": 0,
        "metrics": None,
    }  # fmt: skip


def test_an_answer_that_is_still_being_written_gives_its_complete_points() -> None:
    whole = '<points x1="10.0" y1="20.0" x2="30.0" y2="40.0" alt="mugs">mugs</points>'
    counts = [parse_points(whole[:end]).count for end in range(len(whole) + 1)]
    first, second = whole.index('" x2'), whole.index('" alt')
    assert counts == [0] * (first + 1) + [1] * (second - first) + [2] * (len(whole) - second)


# Molmo 2's forms, against AllenAI's parser: images of 1000 x 1000 pixels, a video of 2 fps

FRAME = np.zeros((48, 64, 3), np.uint8)
CLIP = Clip((FRAME,) * 9, tuple(i / 2 for i in range(9)))


@pytest.mark.parametrize("case", GOLDEN["points"], ids=lambda case: case["text"])
def test_points_and_tracks_are_those_of_the_official_parser(case: dict[str, Any]) -> None:
    result = parse_points(case["text"])
    frames = [one.t if one.image_index is None else one.image_index + 1 for one in result.points]
    ours = [
        [frame, str(one.id), pytest.approx(1000 * one.x), pytest.approx(1000 * one.y)]
        for frame, one in zip(frames, result.points, strict=True)
    ]
    # The official parser reads nothing of a text that was cut off.
    assert ours == case["multi"] or (result.truncated and case["multi"] == [])
    placed = result.placed((), CLIP)
    tracks = TrackResult.of(placed).tracks
    for group in case["tracks"]:
        for id, point in group["points"].items():
            x, y = (value / 1000 for value in point["point"])
            assert TrackPoint(group["time"], x, y) in tracks[int(id)]
            assert group["frame"] in [one.frame for one in placed.points if one.id == int(id)]


@pytest.mark.parametrize("case", GOLDEN["format"], ids=lambda case: case["call"])
def test_texts_of_the_training_data_are_read_whole(case: dict[str, Any]) -> None:
    result = parse_points(case["text"])
    triples = [f"{p.id} {1000 * p.x:03.0f} {1000 * p.y:03.0f}" for p in result.points]
    assert re.findall(r"\d+ \d{3,4} \d{3,4}", case["text"]) == triples
    assert (result.malformed, result.consistent) in ((0, None), (0, True))


def test_a_track_has_one_position_at_a_time_in_order() -> None:
    text = '<tracks coords="1.0 2 310 410 2 1 001;0.0 1 100 200 1 300 400 2 1000 000">x</tracks>'
    result = TrackResult.of(parse_points(text).placed((), CLIP), CLIP)
    assert list(result.tracks.items()) == [
        (1, (TrackPoint(0.0, 0.1, 0.2),)),
        (2, (TrackPoint(0.0, 1.0, 0.0), TrackPoint(1.0, 0.31, 0.41))),
    ]
    written = json.loads(result.to_json())
    assert written["tracks"]["1"] == [{"time_s": 0.0, "x": 0.1, "y": 0.2}]
    none = TrackResult.of(parse_points("No tracks available."))
    assert none.none_found and none.tracks == {}


def test_points_are_placed_in_the_images_or_frames_of_the_request() -> None:
    text = '<points coords="1 1 100 200;2 2 300 400;5 3 500 600">cups</points>'
    two = parse_points(text).placed((FRAME, FRAME), None)
    assert [one.image_index for one in two.points] == [0, 1]
    assert two.malformed == 1 and two.image is FRAME
    assert [one.image_index for one in parse_points(text).placed((FRAME,), None).points] == [0] * 3
    # The model writes times with one decimal; the nearest frame counts.
    clip = replace(CLIP, times=(*CLIP.times[:8], 4.96))
    video = parse_points(text.replace("1 1", "0.2 1")).placed((), clip)
    assert [(one.t, one.frame) for one in video.points] == [(0.2, 0), (2.0, 4), (5.0, 8)]
    assert all(one.image_index is None for one in video.points)
    assert len(video.images) == 9


# No text makes it raise, hang or slow down

PIECES = st.sampled_from([
    *TEXTS, "<", ">", "/", "=", '"', "'", " ", "\t", ";", ",", ".", "-", "(", ")", "&", "&#", "\n",
    "<point", "<points ", "<tracks ", "</point>", "</points", "coords=", 'coords="1 ', 'alt="',
    "x", "y1", "x1=", "p=", "1=", 'x="', 'y="', "Click(", "61.5", "40.4", "100", "1000", "123",
    "123,456", "1e9", "NaN", "\u0661", "\u00a0", "\ud800", "\0", "total of ", "None", "n't in the ",
])  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text: str = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        start, stop = sorted(draw(st.tuples(*2 * [st.integers(0, len(text))])))
        piece: str = draw(st.one_of(PIECES, st.text(max_size=3), st.just("")))
        text = text[:start] + piece + text[stop:]
    return text


@settings(deadline=None, max_examples=300)
@given(st.one_of(mutated(), st.lists(PIECES, max_size=12).map("".join), st.text()))
def test_any_text_gives_a_sound_result(text: str) -> None:
    whole = parse_points(text)
    assert whole.text == text
    assert all(0 <= p.x <= 1 and 0 <= p.y <= 1 for p in whole.points)
    assert all(type(p.x) is float and type(p.y) is float for p in whole.points)
    assert not (whole.none_found and whole.points)
    assert json.loads(whole.to_json()) == whole.as_dict()


STARTS = ['<points x="', '<points coords="1 ', '<point alt="', "<point x=1 y=2>", "Click("]
REPEATED = [
    "<points ", "<point>", '"', "(", "Click(", "1", "1.5 ", "(1.5, ", "x1=1 ", "1 100 200 ", " ",
    "&#1", "</", "a", "a ", "total of ", "there is no ", "C", "<point x=1 y=2>", "alt=",
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("repeated", REPEATED)
def test_any_long_text_is_read_in_linear_time(repeated: str) -> None:
    # Quadratic cost would be minutes to hours here; linear cost is about a second.
    began = time.process_time()
    parse_points(repeated * (500_000 // len(repeated)))
    for start in STARTS:
        parse_points(start + repeated * (50_000 // len(repeated)))
    assert time.process_time() - began < 20


# From points to pixels


@settings(deadline=None, max_examples=100)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 10**6), st.integers(1, 10**6))
def test_px_is_column_and_row_and_always_inside_the_image(
    x: float, y: float, width: int, height: int
) -> None:
    assert Point(0.615, 0.404).px((640, 480)) == (393, 193)
    column, row = Point(x, y).px((width, height))
    assert type(column) is int and type(row) is int
    assert 0 <= column < width and 0 <= row < height


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (480, 640, 3)])
def test_what_is_no_size_or_no_place_in_an_image_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match="size"):
        Point(0.5, 0.5).px(size)
    for x, y in ((-0.1, 0.5), (0.5, 1.01), (float("nan"), 0.5), (0.5, float("inf"))):
        with pytest.raises(InputError, match="outside the image"):
            Point(x, y)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_refer_to_the_upright_image(orientation: int) -> None:
    data = encode(stored(orientation), "PNG", exif=exif(orientation))
    result = PointResult("", (Point(0.8, 0.25),))
    assert same(result.draw(Image.open(io.BytesIO(data))), result.draw(stored(1)))


# Drawing


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def is_marked(image: Image.Image, point: Point) -> bool:
    """Whether the pixel under a point has the strong colour of a dot."""
    pixel: Any = image.getpixel(point.px(image.size))
    return max(pixel) - min(pixel) > 150


@pytest.mark.parametrize("mode", ["RGB", "LA", "P", "I;16"])
def test_draw_makes_a_new_image_from_any_mode(mode: str) -> None:
    image = Image.new(mode, (64, 48))
    before = image.tobytes()
    result = parse_points(MUG)
    drawn = result.draw(image)
    assert drawn.mode == "RGB" and drawn.size == (64, 48)
    assert (image.mode, image.tobytes()) == (mode, before)
    assert is_marked(drawn, result.points[0])
    assert same(parse_points("None.").draw(image), load(image))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (16, 16), (64, 48), (2000, 20), (2000, 1500)])
@pytest.mark.parametrize("xy", [(0, 0), (1, 1), (0.5, 0.5), (1, 0)])
@pytest.mark.parametrize("label", ["mug", "caf\u00e9 \u8336\u676f\0\n\ud800", "x" * 5000])
def test_a_dot_is_on_its_point_at_any_size(
    size: tuple[int, int], xy: tuple[int, int], label: str
) -> None:
    point = Point(*xy, label)
    drawn = PointResult("", (point,) * 20).draw(Image.new("RGB", size))
    assert drawn.size == size and is_marked(drawn, point)


@pytest.mark.parametrize("background", ["black", "white", "gray"])
@pytest.mark.parametrize("xy", [(0.3, 0.6), (1, 0)])
def test_dots_and_numbers_show_on_any_background(background: str, xy: tuple[float, float]) -> None:
    image = Image.new("RGB", (640, 480), background)
    for size, text in ((17, "a dot"), (40, "and a number beside it")):
        drawn = PointResult("", (Point(*xy),)).draw(image)
        column, row = Point(*xy).px(image.size)
        part = drawn.crop((column - size, row - size, column + size, row + size))
        levels = part.convert("L").getextrema()
        assert levels[0] < 70 and levels[1] > 190, text
        drawn.paste(background, (column - 8, row - 8, column + 9, row + 9))


def test_draw_takes_one_of_several_images_and_keeps_the_numbers() -> None:
    image = Image.new("RGB", (640, 480), "navy")
    text = '<points coords="1 1 300 300;2 2 700 700">cups</points>'
    result = parse_points(text).placed((image, image), None)
    for index, other in ((0, 1), (1, 0)):
        drawn = result.draw(index=index)
        assert is_marked(drawn, result.points[index])
        assert drawn.getpixel(result.points[other].px(image.size)) == (0, 0, 128)
    for index in (-1, 2):
        with pytest.raises(InputError, match="no such image"):
            result.draw(index=index)


@pytest.mark.parametrize("frames", [1, 9])
def test_a_point_after_the_end_of_the_video_is_not_drawn(frames: int, tmp_path: Path) -> None:
    clip = Clip((FRAME,) * frames, CLIP.times[:frames])
    result = parse_points('<tracks coords="0.0 1 200 200;999 1 700 700">x</tracks>')
    placed = result.placed((), clip)
    assert [one.frame for one in placed.points] == [0, None]
    assert [is_marked(placed.draw(index=0), one) for one in placed.points] == [True, False]
    assert same(placed.draw(index=-1 % frames), load(FRAME)) == (frames > 1)
    TrackResult.of(placed, clip).draw(tmp_path / "drawn.mp4")
    last = load_video(tmp_path / "drawn.mp4", VideoLimits()).frames[-1]
    assert (last.max() > 150) == (frames == 1)


def test_draw_uses_the_image_the_result_knows_and_says_what_is_wrong_with_one() -> None:
    image = Image.new("RGB", (64, 48), "navy")
    result = parse_points(MUG)
    assert same(replace(result, images=(image,)).draw(), result.draw(image))
    with pytest.raises(InputError, match="no such image"):
        result.draw()
    with pytest.raises(ImageError):
        result.draw(b"broken")
