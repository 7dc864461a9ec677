"""Several images and videos, in every method that takes them, over a fake engine."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge import EdgeVLM, Request, Video
from molmo_edge.engine.fake import FakeEngine, FakeFactory
from molmo_edge.errors import ConfigError, ImageError, PromptError, SamplingError, VideoError
from molmo_edge.interface import Turn
from molmo_edge.points import TrackPoint
from tests.image_files import encode

IMAGE = np.zeros((20, 30, 3), np.uint8)
VIDEO = Video(np.zeros((9, 20, 30, 3), np.uint8), fps=4.0)
TIMES = (0.0, 0.5, 1.0, 1.5, 2.0)
TEXTS = {
    "Point to cups": '<points coords="1 1 100 200;2 2 300 400">cups</points>',
    "How many cups are there?": 'There are 2 <points coords="0.5 1 100 200;2.0 2 300 400">cups'
    "</points>.",
    "Track cups.": '<tracks coords="0.0 1 100 200;0.5 1 110 210 2 500 600">cups</tracks>',
    "Track unicorns.": "No tracks available.",
}


def answer(turns: Sequence[Turn]) -> str:
    """What the engine sees, or an answer from the table."""
    images = [len(turn.images) for turn in turns]
    times = [turn.video.times for turn in turns if turn.video is not None]
    return TEXTS.get(turns[-1].text, f"{images} {times}")


ANSWERS = answer


@pytest.mark.parametrize(
    ("image", "video", "seen"),
    [
        (None, None, "[0] []"),
        (IMAGE, None, "[1] []"),
        ([IMAGE, IMAGE], None, "[2] []"),
        ((IMAGE,) * 3, None, "[3] []"),
        (None, VIDEO, f"[0] [{TIMES}]"),
    ],
)
def test_every_way_to_ask_takes_images_or_a_video(
    vlm: EdgeVLM, image: Any, video: Any, seen: str
) -> None:
    async def ask() -> list[str]:
        streamed = [delta async for delta in vlm.astream(image, "q", video=video)]
        [one] = await vlm.abatch([request])
        return ["".join(streamed), str(await vlm.aquery(image, "q", video=video)), str(one)]

    request = Request(image, "q", video=video)
    answers = [vlm.query(image, "q", video=video).text, *map(str, vlm.batch([request]))]
    answers += ["".join(vlm.stream(image, "q", video=video)), *asyncio.run(ask())]
    assert answers == [seen] * 6
    assert len(vlm.score(image, "q", [5], video=video).logprobs) == 1


def test_a_conversation_has_images_in_any_turn_or_one_video(
    vlm: EdgeVLM, fake: FakeFactory
) -> None:
    def turns(*contents: Sequence[Any]) -> list[dict[str, Any]]:
        roles = ("user", "assistant") * 2
        return [
            {"role": role, "content": [*content, {"type": "text", "text": "q"}]}
            for role, content in zip(roles, contents, strict=False)
        ]

    image, video = {"type": "image", "image": IMAGE}, {"type": "video", "video": VIDEO}
    png = base64.b64encode(encode(Image.fromarray(IMAGE), "PNG")).decode()
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
    assert vlm.chat(turns([url], [], [image])).text == "[1, 0, 1] []"
    assert vlm.chat(turns([image], [], [image, image])).text == "[1, 0, 2] []"
    assert vlm.chat(turns([], [], [video])).text == f"[0, 0, 0] [{TIMES}]"
    added = len(fake.engine.added)
    several = ([video, video],), ([video], [], [video]), ([image, video],), ([image], [], [video])
    for wrong in (*several, ([], [video], []), ([], [image], [])):
        with pytest.raises(PromptError):
            vlm.chat(turns(*wrong))
    assert len(fake.engine.added) == added


def test_a_video_that_cannot_be_used_is_its_own_failure(vlm: EdgeVLM) -> None:
    requests = [Request(None, "q", video=b"no"), Request(None, "q"), Request(["a.png"], "q")]
    first, second, third = vlm.batch(requests, return_exceptions=True)
    assert isinstance(first, VideoError) and isinstance(third, ImageError)
    assert str(second) == "[0] []" and str(third).startswith("'a.png': could not read")
    with pytest.raises(ImageError, match=r"^Request 1 of the batch: 'a\.png': could not read"):
        vlm.batch(requests[1:])


def test_a_family_without_video_refuses_one(vlm: EdgeVLM, fake: FakeFactory) -> None:
    family: Any = SimpleNamespace(name="plain", verbs={"query", "point"}, prompts={})
    vlm.family = family
    message = {"role": "user", "content": [{"type": "video", "video": VIDEO}]}
    for call in (
        lambda: vlm.query(None, "q", video=VIDEO),
        lambda: vlm.chat([message]),
        lambda: vlm.point(video=VIDEO, label="cups"),
        lambda: vlm.track(VIDEO, "cups"),
    ):
        with pytest.raises(ConfigError, match=r"plain, does not support (video|track); .* Molmo 2"):
            call()
    assert fake.engine.added == []
    assert not vlm.supports("video")


def test_points_say_in_which_image_they_are(vlm: EdgeVLM) -> None:
    answer = vlm.point([IMAGE, IMAGE], "cups")
    places = [(one.x, one.image_index, one.t) for one in answer.points]
    assert places == [(0.1, 0, None), (0.3, 1, None)]
    assert answer.draw(index=1).size == (30, 20)
    with pytest.raises(ImageError, match="nothing to look at"):
        vlm.point([], "cups")


def test_points_of_a_video_have_times_and_frames(vlm: EdgeVLM) -> None:
    answer = vlm.count(video=VIDEO, label="cups")
    assert answer.number == 2 and answer.consistent
    assert [(one.t, one.frame) for one in answer.points.points] == [(0.5, 1), (2.0, 4)]
    assert len(answer.points.images) == len(TIMES)
    labels = vlm.point(video=VIDEO, label=["cups", "cups"])
    assert [one.points[1].t for one in labels] == [2.0, 2.0]


def test_a_track_has_its_clip_and_room_for_a_long_answer(vlm: EdgeVLM, fake: FakeFactory) -> None:
    answer = vlm.track(VIDEO, " Cups ")
    assert answer.tracks == {
        1: (TrackPoint(0.0, 0.1, 0.2), TrackPoint(0.5, 0.11, 0.21)),
        2: (TrackPoint(0.5, 0.5, 0.6),),
    }
    assert answer.clip is not None and answer.clip.times == TIMES
    assert answer.result is not None and not answer.truncated
    assert vlm.track(VIDEO, "cups", max_tokens=2).truncated
    none = vlm.track(VIDEO, "unicorns")
    assert none.none_found and none.tracks == {}


@pytest.mark.parametrize("video", [VIDEO, None])
def test_what_takes_no_video_refuses_one(vlm: EdgeVLM, fake: FakeFactory, video: Any) -> None:
    messages, given = [{"role": "user", "content": "q"}], {"video": video}
    for call in (
        lambda: vlm.chat(messages, **given),
        lambda: vlm.chat_stream(messages, **given),
        lambda: asyncio.run(vlm.achat(messages, **given)),
        lambda: vlm.batch([Request.chat(messages, **given)]),
        lambda: vlm.caption(IMAGE, **given),
        lambda: asyncio.run(vlm.acaption(IMAGE, **given)),
    ):
        with pytest.raises(SamplingError, match="Unknown option video"):
            call()
    assert fake.engine.added == []


def test_a_setting_limits_the_frames() -> None:
    with EdgeVLM(engine=FakeEngine.factory(answer), max_frames=3) as vlm:
        assert vlm.query(None, "q", video=VIDEO).text == "[0] [(0.0, 1.0, 2.0)]"
    frames = [encode(Image.effect_noise((90, 90), 99), "PNG")] * 2
    with EdgeVLM(engine=FakeEngine.factory(answer), max_image_bytes=3000) as vlm:
        with pytest.raises(VideoError, match=r"frame 0 .* max_image_bytes"):
            vlm.query(None, "q", video=Video(frames, fps=1.0))
        assert [type(one.error) for one in vlm.watch(frames, window=2)] == [VideoError] * 2
    with (
        EdgeVLM(engine=FakeEngine.factory(answer), max_image_pixels=100) as vlm,
        pytest.raises(VideoError, match="pixels"),
    ):
        vlm.query(None, "q", video=VIDEO)
