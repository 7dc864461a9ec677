"""point, count, caption and structured answers, over scripted answers of a fake engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel, Field, RootModel, field_validator

from molmo_edge import CountResult, EdgeVLM, PointResult, Request, Result, TrackResult, Video
from molmo_edge.engine.fake import FakeEngine, FakeFactory
from molmo_edge.errors import ConfigError, GenerationError, ImageError, PromptError, SamplingError

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


def test_point_uses_the_prompt_of_the_training_data_and_parses_the_answer(
    vlm: EdgeVLM, fake: FakeFactory, photo: np.ndarray
) -> None:
    answer = vlm.point(photo, "  The Red  mug ")
    assert fake.engine.prompts == ["Point to the red mug"]
    assert isinstance(answer, PointResult)
    assert [(one.x, one.y, one.label) for one in answer.points] == [(0.615, 0.404, "mug")]
    assert answer.points[0].px((120, 90)) == (73, 36)
    assert not answer.truncated
    assert answer.result is not None and answer.result.text == answer.text == MUG
    assert answer.as_dict()["label"] == "the red mug"
    assert answer.as_dict()["metrics"]["image_tokens"] == 144
    fake.engine.prompts.clear()
    answers = vlm.point(photo, ["spoon", "unicorn", "the red mug"])
    assert [one.label for one in answers] == ["spoon", "unicorn", "the red mug"]
    assert [one.count for one in answers] == [2, 0, 1]
    with pytest.raises(ImageError):
        vlm.point(None, "mug")


def test_a_batch_takes_requests_of_every_kind(vlm: EdgeVLM, photo: np.ndarray) -> None:
    about = Video([photo] * 4, fps=2)
    requests: list[Any] = [
        Request(photo, "What?"),
        Request.chat([{"role": "user", "content": "What?"}]),
        Request.caption(photo, "short"),
        Request.point(photo, "the red mug"),
        Request.count(photo, "cups", max_tokens=100),
        Request.track(about, "cat"),
        Request.point(photo, " "),
        Request.caption(photo, ["long"]),  # type: ignore[arg-type]
        (photo, "What?"),
        {"image": photo, "text": "What?"},
    ]
    answers = vlm.batch(requests, return_exceptions=True)
    kinds = [Result, Result, Result, PointResult, CountResult, TrackResult, *[PromptError] * 4]
    assert [type(one) for one in answers] == kinds
    assert answers[3].count == 1 and answers[4].number == 4 and answers[5].label == "cat"
    assert sorted(index for index, _ in vlm.iter_batch(requests)) == list(range(10))
    again = asyncio.run(vlm.abatch(requests, return_exceptions=True))
    assert [type(one) for one in again] == kinds
    with pytest.raises(PromptError, match=r"Request 6 of the batch: .* empty"):
        vlm.batch(requests)


def test_every_verb_has_a_twin_for_asyncio_with_the_same_answer(
    fake: FakeFactory, photo: np.ndarray
) -> None:
    messages = [{"role": "user", "content": "What?"}]
    calls: list[tuple[str, Any]] = [
        ("chat", (messages,)),
        ("caption", (photo, "long")),
        ("choose", (photo, "What?", ["Something.", "Nothing."])),
        ("point", (photo, "spoon")),
        ("point", (photo, ["spoon", "unicorn"])),
        ("count", (photo, "cups")),
        ("track", (Video([photo] * 4, fps=2), "cat")),
    ]

    async def twins() -> None:
        async with EdgeVLM(engine=fake) as vlm:
            for name, arguments in calls:
                ours = await getattr(vlm, f"a{name}")(*arguments)
                same = await asyncio.to_thread(getattr(vlm, name), *arguments)
                answers = [[one] if not isinstance(one, list) else one for one in (ours, same)]
                for one, other in zip(*answers, strict=True):
                    assert type(one) is type(other) and repr(one)[:60] == repr(other)[:60]
            deltas = [delta async for delta in vlm.achat_stream(messages)]
            assert "".join(deltas) == "Something."
        assert vlm.state == "closed"

    asyncio.run(twins())


def test_points_are_drawn_on_the_image_as_it_was(vlm: EdgeVLM) -> None:
    frame = np.zeros((60, 80, 3), np.uint8)
    answer = vlm.point(frame, "spoon")
    frame[:] = 255  # the camera reuses its buffer
    drawn = np.asarray(answer.draw())
    assert drawn.shape == (60, 80, 3)
    assert tuple(drawn[59, 0]) == (0, 0, 0)
    assert drawn[12, 8].any()


@pytest.mark.parametrize(
    "settings",
    [{}, {"resize": "tensorflow", "max_crops": 1}, {"precision": "fp8", "max_image_bytes": 10**6}],
)
def test_the_types_of_a_result_depend_on_no_setting_and_no_kind_of_image(
    settings: dict[str, Any], photo: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    with EdgeVLM(engine=FakeEngine.factory(ANSWERS), **settings) as vlm:
        for image in (photo, Image.fromarray(photo), path, str(path), path.read_bytes()):
            answer = vlm.point(image, "spoon")
            assert type(answer.image) is Image.Image and answer.image.size == (120, 90)
            assert type(answer.draw()) is Image.Image
            assert type(vlm.count(image, "spoons").points) is PointResult


def test_a_truncated_answer_keeps_its_complete_points(photo: np.ndarray) -> None:
    with EdgeVLM(engine=FakeEngine.factory(ANSWERS, pieces="chars")) as vlm:
        answer = vlm.point(photo, "spoon", max_tokens=SPOONS.index('y2="') + 1)
    assert answer.truncated
    assert [(one.x, one.y) for one in answer.points] == [(0.1, 0.2)]
    assert answer.result is not None and answer.result.finish_reason == "length"


@pytest.mark.parametrize(
    "label", ["   ", "\u200d \u200c", "a <b>", "a\x1b[31m", "a\ud800", None, b"mug", []]
)
def test_labels_that_are_not_plain_words_are_refused(
    vlm: EdgeVLM, fake: FakeFactory, photo: np.ndarray, label: Any
) -> None:
    for call in (vlm.point, vlm.count):
        with pytest.raises(PromptError):
            call(photo, label)
    with pytest.raises(PromptError):
        vlm.point(photo, ["mug", label])
    with pytest.raises(PromptError, match="only point"):
        vlm.count(photo, ["mug", "cup"])  # type: ignore[arg-type]
    assert fake.engine.added == []


@pytest.mark.parametrize(
    "label",
    [
        "\u0645\u06cc\u200c\u062e",
        "\u0915\u094d\u200d\u0937",
        "\U0001f468\u200d\U0001f467",
        "\U0001fae9",
        "a\u00a0b",
    ],
)
def test_labels_of_any_script_are_kept(
    vlm: EdgeVLM, fake: FakeFactory, photo: np.ndarray, label: str
) -> None:
    assert vlm.point(photo, label).label == label.replace("\u00a0", " ")
    assert fake.engine.prompts == ["Point to " + label.replace("\u00a0", " ")]


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
def test_count_prefers_points_to_the_stated_number(
    vlm: EdgeVLM, photo: np.ndarray, label: str, number: int | None, how: str, consistent: Any
) -> None:
    answer = vlm.count(photo, label)
    assert (answer.number, answer.how, answer.consistent) == (number, how, consistent)
    assert not answer.points.truncated
    assert answer.points.result is not None


def test_a_family_that_cannot_point_raises(vlm: EdgeVLM, photo: np.ndarray) -> None:
    vlm.family = SimpleNamespace(name="plain", verbs={"query", "chat"})  # type: ignore[assignment]
    assert not vlm.supports("point") and vlm.supports("query")
    for call in (vlm.point, vlm.count, vlm.caption):
        with pytest.raises(ConfigError, match=r"plain, does not support .*chat, query"):
            call(photo, "mug")


def test_captions_have_three_lengths(vlm: EdgeVLM, fake: FakeFactory, photo: np.ndarray) -> None:
    for length in ("short", "normal", "long"):
        assert vlm.caption(photo, length).text == "Something."
    assert fake.engine.prompts == [
        "Describe this image in one sentence.",
        "Describe this image.",
        "Describe this image in detail.",
    ]
    with pytest.raises(PromptError, match="short, normal, long"):
        vlm.caption(photo, "endless")  # type: ignore[arg-type]
    for wrong in (None, [], [photo] * 2):
        with pytest.raises(ImageError, match="one image"):
            vlm.caption(wrong)  # type: ignore[arg-type]
        with pytest.raises(ImageError, match="one image"):
            asyncio.run(vlm.acaption(wrong))  # type: ignore[arg-type]


# Structured answers: the fake engine spells the JSON; what vLLM refuses is tested on vLLM.


class Door(BaseModel):
    open: bool
    colour: Literal["red", "green"]
    handles: int = Field(ge=0, le=9)


class Picky(Door):
    @field_validator("handles")
    @classmethod
    def odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("odd numbers only")
        return value


class NoSchema(BaseModel):
    model_config = {"arbitrary_types_allowed": True}
    image: Image.Image


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


def test_a_schema_gives_plain_values_and_is_copied() -> None:
    schema = {"type": "object", "properties": {"open": {"type": "boolean"}}}
    with answering('{"open": false}') as vlm:
        stream = vlm.stream(None, "x", json_schema=schema)
        schema["properties"] = {}
        assert "".join(stream) == '{"open": false}'
        assert stream.result().parsed == {"open": False}


@pytest.mark.parametrize(
    ("answer", "json_schema", "options", "match"),
    [
        (GOOD, Door, {"max_tokens": 10}, "max_tokens"),
        ("12345", {"type": "integer"}, {"max_tokens": 3}, "cut off"),
        ("12345", RootModel[int], {"max_tokens": 3}, "cut off"),
        ("12345", {"type": "integer"}, {"stop": ["x", "34"]}, "cut off"),
        ("1.5", {"type": "number"}, {"stop": "."}, "cut off"),
        (GOOD, Door, {"stop": "colour"}, "stop string"),
        (GOOD, Picky, {}, "Picky"),
    ],
)
def test_an_incomplete_or_refused_answer_is_an_error_that_keeps_its_text(
    answer: str, json_schema: Any, options: dict[str, Any], match: str
) -> None:
    with answering(answer) as vlm, pytest.raises(GenerationError, match=match) as caught:
        vlm.query(None, "x", json_schema=json_schema, **options)
    assert caught.value.partial and answer.startswith(caught.value.partial)


def test_a_number_that_a_stop_string_did_not_cut_is_whole() -> None:
    with answering("12\n34") as vlm:
        result = vlm.query(None, "x", json_schema={"type": "integer"}, stop=["5", "\n"])
        assert (result.parsed, result.finish_reason) == (12, "stop")
    with answering("12") as vlm:
        assert vlm.query(None, "x", json_schema={"type": "integer"}, stop="3").parsed == 12


def test_an_answer_that_is_nested_too_deeply_is_an_error() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    with EdgeVLM(engine=FakeEngine.factory(deep)) as vlm, pytest.raises(GenerationError) as caught:
        vlm.query(None, "x", json_schema={"type": "array"})
    assert caught.value.partial == deep


@pytest.mark.parametrize("json_schema", [{}, "object", int, NoSchema, {"enum": [float("nan")]}])
def test_a_schema_that_is_none_is_refused_before_the_engine(
    vlm: EdgeVLM, fake: FakeFactory, json_schema: Any
) -> None:
    with pytest.raises(SamplingError):
        vlm.query(None, "x", json_schema=json_schema)
    with pytest.raises(SamplingError, match="ignore_eos"):
        vlm.query(None, "x", json_schema=Door, ignore_eos=True)
    assert fake.engine.added == []
