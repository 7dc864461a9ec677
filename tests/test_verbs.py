"""point, count, caption and structured answers, over scripted answers of a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel, Field, field_validator

from molmo_edge import EdgeVLM, PointResult, Request
from molmo_edge.engine.fake import FakeEngine, FakeFactory
from molmo_edge.errors import (
    ConfigError,
    GenerationError,
    ImageError,
    PromptError,
    SamplingError,
)

MUG = '<point x="61.5" y="40.4" alt="mug">mug</point>'
SPOONS = '<points x1="10.0" y1="20.0" x2="90.0" y2="80.0" alt="spoon">spoon</points>'
ANSWERS = {
    "Point to the red mug": MUG,
    "Point to spoon": SPOONS,
    "Point to unicorn": "There are none.",
    "How many spoons are there?": f"Counting the {SPOONS} shows a total of 2.",
    "How many forks are there?": f"Counting the {SPOONS} shows a total of 3.",
    "How many cups are there?": "There are 4 cups.",
    "How many unicorns are there?": "There are none.",
    "How many ideas are there?": "Hard to tell.",
    "": "Something.",
}


@pytest.fixture
def fake() -> FakeFactory:
    return FakeEngine.factory(ANSWERS)


@pytest.fixture
def vlm(fake: FakeFactory) -> Iterator[EdgeVLM]:
    with EdgeVLM(engine=fake) as vlm:
        yield vlm


def test_point_asks_as_the_model_was_trained_and_reads_the_answer(
    vlm: EdgeVLM, fake: FakeFactory, photo: np.ndarray
) -> None:
    found = vlm.point(photo, "  The Red  mug ")
    assert fake.engine.prompts == ["Point to the red mug"]
    assert isinstance(found, PointResult)
    assert [(one.x, one.y, one.label) for one in found.points] == [(0.615, 0.404, "mug")]
    assert found.points[0].px((120, 90)) == (73, 36)
    assert not found.truncated
    assert found.result is not None
    assert found.result.text == found.text == MUG
    assert found.result.metrics.output_tokens > 1
    assert found.as_dict()["label"] == "the red mug"
    assert found.as_dict()["metrics"]["image_tokens"] == 144


def test_several_labels_are_one_batch_in_their_order(
    vlm: EdgeVLM, fake: FakeFactory, photo: np.ndarray
) -> None:
    found = vlm.point(photo, ["spoon", "unicorn", "the red mug"])
    assert [one.label for one in found] == ["spoon", "unicorn", "the red mug"]
    assert [one.count for one in found] == [2, 0, 1]
    assert found[1].none_found
    assert len(fake.engine.added) == 3


def test_points_are_drawn_on_the_picture_they_are_about(vlm: EdgeVLM) -> None:
    # A frame whose memory is used again behind our back.
    frame = np.zeros((60, 80, 3), np.uint8)
    found = vlm.point(frame, "spoon")
    frame[:] = 255
    drawn = np.asarray(found.draw())
    assert drawn.shape == (60, 80, 3)
    assert tuple(drawn[59, 0]) == (0, 0, 0)
    assert drawn[12, 8].any()


def test_a_turned_photo_is_drawn_upright(vlm: EdgeVLM) -> None:
    turned = Image.new("RGB", (80, 60))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    assert vlm.point(turned, "spoon").draw().size == (60, 80)


def test_an_answer_cut_off_keeps_its_complete_points_and_says_so(photo: np.ndarray) -> None:
    fake = FakeEngine.factory(ANSWERS, pieces="chars")
    with EdgeVLM(engine=fake) as vlm:
        found = vlm.point(photo, "spoon", max_tokens=SPOONS.index('y2="') + 1)
    assert found.truncated
    assert [(one.x, one.y) for one in found.points] == [(0.1, 0.2)]
    assert found.result is not None
    assert found.result.finish_reason == "length"


@pytest.mark.parametrize(
    "label",
    ["", "   ", "a <b>", "x > y", "<|endoftext|>", "a\x00b", "a\x1b[31m", 7, None, b"mug", []],
)
def test_labels_that_are_no_words_are_refused(vlm: EdgeVLM, photo: np.ndarray, label: Any) -> None:
    with pytest.raises(PromptError):
        vlm.point(photo, label)
    with pytest.raises(PromptError):
        vlm.count(photo, label)
    with pytest.raises(PromptError):
        vlm.point(photo, ["mug", label])
    assert vlm.query(photo, "x").text == "Something."


def test_pointing_needs_a_picture(vlm: EdgeVLM) -> None:
    with pytest.raises(ImageError):
        vlm.point(None, "mug")  # type: ignore[call-overload]


def test_a_refused_option_leaves_nothing_running(
    vlm: EdgeVLM, fake: FakeFactory, photo: np.ndarray
) -> None:
    with pytest.raises(SamplingError):
        vlm.point(photo, ["mug", "spoon"], max_tokens=0)
    assert fake.engine.running == []


@pytest.mark.parametrize(
    ("label", "number", "how", "consistent"),
    [
        ("spoons", 2, "points", True),
        ("Forks", 2, "points", False),
        ("cups", 4, "stated", None),
        ("unicorns", 0, "none", None),
        ("ideas", None, "unread", None),
    ],
)
def test_count_prefers_what_can_be_looked_at(
    vlm: EdgeVLM,
    photo: np.ndarray,
    label: str,
    number: int | None,
    how: str,
    consistent: bool | None,
) -> None:
    found = vlm.count(photo, label)
    assert (found.number, found.how, found.consistent) == (number, how, consistent)
    assert not found.truncated
    assert found.result is not None
    assert found.as_dict()["points"]["text"] == found.result.text


@dataclass(frozen=True)
class Plain:
    """A family that answers but does not point."""

    name: str = "plain"
    verbs: frozenset[str] = frozenset({"query", "chat"})


def test_a_family_that_cannot_point_says_so(vlm: EdgeVLM, photo: np.ndarray) -> None:
    vlm.family = Plain()  # type: ignore[assignment]
    assert not vlm.supports("point")
    for ask in (vlm.point, vlm.count, vlm.caption):
        with pytest.raises(ConfigError, match=r"plain, cannot .*chat, query"):
            ask(photo, "mug")


def test_captions_come_in_three_lengths(
    vlm: EdgeVLM, fake: FakeFactory, photo: np.ndarray
) -> None:
    for length in ("short", "normal", "long"):
        assert vlm.caption(photo, length).text == "Something."
    assert fake.engine.prompts == [
        "Describe this image in one sentence.",
        "Describe this image.",
        "Describe this image in detail.",
    ]
    with pytest.raises(PromptError, match="short, normal, long"):
        vlm.caption(photo, "endless")  # type: ignore[arg-type]


def test_a_conversation_can_be_streamed(vlm: EdgeVLM) -> None:
    stream = vlm.chat_stream([{"role": "user", "content": "Hello"}])
    assert "".join(stream) == "Something."


# Structured answers: the fake engine spells the JSON; what vLLM refuses is tested on vLLM.


class Door(BaseModel):
    open: bool
    colour: Literal["red", "green"]
    handles: int = Field(ge=0, le=9)


GOOD = '{"open": true, "colour": "red", "handles": 2}'


def answering(text: str) -> EdgeVLM:
    return EdgeVLM(engine=FakeEngine.factory(text, pieces="chars"))


def test_a_model_class_gives_a_checked_instance() -> None:
    with answering(GOOD) as vlm:
        result = vlm.query(None, "The door?", json_schema=Door)
        assert result.parsed == Door(open=True, colour="red", handles=2)
        assert result.text == GOOD
        assert vlm.query(None, "The door?").parsed is None
        [one] = vlm.batch([Request(None, "The door?", json_schema=Door)])
        assert isinstance(one.parsed, Door)
        assert asyncio.run(vlm.aquery(None, "x", json_schema=Door)).parsed == result.parsed


def test_a_schema_gives_plain_values_and_is_not_shared_with_the_caller() -> None:
    schema = {"type": "object", "properties": {"open": {"type": "boolean"}}}
    with answering('{"open": false}') as vlm:
        assert vlm.query(None, "x", json_schema=schema).parsed == {"open": False}
        stream = vlm.stream(None, "x", json_schema=schema)
        schema["properties"] = {}
        assert "".join(stream) == '{"open": false}'
        assert stream.result().parsed == {"open": False}


@pytest.mark.parametrize("json_schema", [Door, {"type": "object"}])
def test_a_cut_off_answer_is_an_error_that_keeps_its_text(json_schema: Any) -> None:
    with (
        answering(GOOD) as vlm,
        pytest.raises(GenerationError, match="max_tokens") as caught,
    ):
        vlm.query(None, "x", json_schema=json_schema, max_tokens=10)
    assert caught.value.partial == GOOD[:9]


def test_part_of_a_number_is_not_taken_for_the_number() -> None:
    with answering("12345") as vlm:
        assert vlm.query(None, "x", json_schema={"type": "integer"}).parsed == 12345
        with pytest.raises(GenerationError, match="cut off"):
            vlm.query(None, "x", json_schema={"type": "integer"}, max_tokens=3)


def test_a_stop_text_inside_the_json_is_an_error() -> None:
    with answering(GOOD) as vlm, pytest.raises(GenerationError, match="stop string"):
        vlm.query(None, "x", json_schema=Door, stop="colour")


def test_checks_that_no_schema_can_say_are_still_made() -> None:
    class Picky(Door):
        @field_validator("handles")
        @classmethod
        def even(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError("odd numbers only")
            return value

    with answering(GOOD) as vlm, pytest.raises(GenerationError, match="Picky") as caught:
        vlm.query(None, "x", json_schema=Picky)
    assert caught.value.partial == GOOD


class NoSchema(BaseModel):
    model_config = {"arbitrary_types_allowed": True}
    image: Image.Image


@pytest.mark.parametrize(
    "json_schema", [{}, [], "object", int, NoSchema, {"enum": [float("nan")]}, {"x": object()}]
)
def test_what_is_no_schema_is_refused_before_the_call(json_schema: Any) -> None:
    fake = FakeEngine.factory(GOOD)
    with EdgeVLM(engine=fake) as vlm:
        with pytest.raises(SamplingError):
            vlm.query(None, "x", json_schema=json_schema)
        assert fake.engine.added == []


def test_schema_and_endless_answers_exclude_each_other() -> None:
    with answering(GOOD) as vlm, pytest.raises(SamplingError, match="ignore_eos"):
        vlm.query(None, "x", json_schema=Door, ignore_eos=True)
