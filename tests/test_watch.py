"""`watch`: always the newest frame, drops counted, stalls reported, no thread left."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import (
    CameraError,
    ConfigError,
    ImageError,
    MissingDependencyError,
    RequestTimeout,
    SamplingError,
    VideoError,
)
from molmo_edge.watch import Seen

cv2 = pytest.importorskip("cv2")


def image(value: int = 0) -> np.ndarray:
    return np.full((8, 12, 3), value, np.uint8)


def value(seen: Seen) -> int:
    return int(np.asarray(seen.image)[0, 0, 0])


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while left := [t.name for t in threading.enumerate() if t.name == "molmo-edge-camera"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.fixture
def vlm() -> Iterator[EdgeVLM]:
    with EdgeVLM(engine=FakeEngine.factory("A cup.")) as vlm:
        yield vlm


class Source:
    """Delivers numbered frames on demand; a generator function for `watch`."""

    def __init__(self, frames: int = 0) -> None:
        self.more = threading.Semaphore(frames)
        self.given = self.awaited = self.closed = 0
        self.ended = False
        self.changed = threading.Condition()

    def __call__(self) -> Iterator[np.ndarray]:
        try:
            while True:
                with self.changed:
                    self.awaited = self.given + 1
                    self.changed.notify_all()
                self.more.acquire()
                if self.ended:
                    return
                self.given += 1
                yield image(self.given)
        finally:
            self.closed += 1

    def wait(self, number: int) -> None:
        """Wait until a frame is asked for; the one before it lies ready then."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.awaited == number, 10)

    def end(self) -> None:
        self.ended = True
        self.more.release()


def test_a_slow_consumer_sees_the_newest_frame_and_how_many_it_missed(vlm: EdgeVLM) -> None:
    camera = Source(1)
    seen = vlm.watch(camera)
    first = next(seen)
    assert (value(first), first.index, first.dropped) == (1, 0, 0)
    assert first.result is not None and first.result.text == "A cup."
    camera.more.release(4)
    camera.wait(6)
    second = next(seen)
    assert (value(second), second.index, second.dropped) == (5, 4, 3)
    assert second.captured_s > first.answered_s
    assert abs(second.captured_at - time.time()) < 5
    camera.end()
    assert next(seen, None) is None
    assert camera.closed == 1


def test_the_last_frame_is_answered_though_the_source_has_ended(vlm: EdgeVLM) -> None:
    seen = list(vlm.watch(iter([image(i) for i in range(50)])))
    frames = [value(one) for one in seen]
    assert frames[-1] == 49 and frames == sorted(frames)
    assert len(seen) + sum(one.dropped for one in seen) == 50


def test_nothing_is_dropped_from_lists_directories_or_when_asked_not_to(
    vlm: EdgeVLM, tmp_path: Path
) -> None:
    images = [image(i) for i in range(9)]
    assert [value(one) for one in vlm.watch(images)] == list(range(9))
    assert [value(one) for one in vlm.watch(iter(images), drop="none")] == list(range(9))
    for i in (2, 0, 1):
        Image.fromarray(image(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    seen = list(vlm.watch(tmp_path))
    assert [Path(str(one.image)).name for one in seen] == ["0.png", "1.png", "2.png"]
    assert all(one.result is not None for one in seen)
    assert [one.dropped for one in seen] == [0, 0, 0]
    assert [one.image for one in vlm.watch(tmp_path / "1.png")] == [tmp_path / "1.png"]


def values(seen: Seen) -> list[int]:
    assert seen.video is not None
    return [int(np.asarray(frame)[0, 0, 0]) for frame in seen.video.frames]


def test_a_window_is_a_video_of_the_last_frames_dropped_ones_too() -> None:
    def clip(turns: Any) -> str:
        return str([int(frame[0, 0, 0]) for frame in turns[0].video.frames])

    camera = Source(1)
    with EdgeVLM(engine=FakeEngine.factory(clip), max_frames=3) as vlm:
        seen = vlm.watch(camera, "What happens?", window=3)
        assert values(next(seen)) == [1]
        camera.more.release(4)
        camera.wait(6)
        second = next(seen)
        assert (second.dropped, values(second)) == (3, [3, 4, 5])
        assert second.result is not None and second.result.text == "[3, 4, 5]"
        assert second.video is not None and second.video.timestamps is not None
        assert second.video.timestamps[0] == 0 < second.video.timestamps[1]
        camera.end()
        seen.close()
        images = [image(i) for i in range(3)]
        assert [values(one) for one in vlm.watch(images, window=2)] == [[0], [0, 1], [1, 2]]
        for window in (1, True, 4):
            with pytest.raises(ConfigError, match="window must be"):
                vlm.watch(images, window=window)


def test_frames_of_a_window_are_as_far_apart_as_max_fps_says(vlm: EdgeVLM) -> None:
    def fast() -> Iterator[np.ndarray]:
        for i in range(30):
            time.sleep(0.01)
            yield image(i)

    last = list(vlm.watch(fast, max_fps=20, window=4))[-1]
    assert last.video is not None and last.video.timestamps is not None
    assert values(last)[-1] == 29 and len(values(last)) == 4
    assert all(gap >= 1 / 20 for gap in np.diff(last.video.timestamps)[:-1])


def test_a_buffer_that_is_filled_again_does_not_change_a_frame(vlm: EdgeVLM) -> None:
    def frames() -> Iterator[np.ndarray]:
        buffer = image()
        for i in range(3):
            buffer[:] = i
            yield buffer

    seen = list(vlm.watch(frames(), drop="none"))
    assert [value(one) for one in seen] == [0, 1, 2]


def test_max_fps_is_not_exceeded(vlm: EdgeVLM) -> None:
    began = time.monotonic()
    seen = list(vlm.watch([image(i) for i in range(4)], max_fps=20))
    assert len(seen) == 4
    assert time.monotonic() - began >= 3 / 20


def test_a_stall_is_an_error_and_an_older_frame_is_not_taken_for_a_new_one(vlm: EdgeVLM) -> None:
    camera = Source(1)
    seen = vlm.watch(camera, frame_timeout=0.5)
    next(seen)
    camera.more.release()
    camera.wait(3)
    time.sleep(0.6)  # longer than frame_timeout: the clock is what is tested
    with pytest.raises(CameraError, match=r"no frame for 0\.5 s"):
        next(seen)
    camera.end()


def test_a_camera_that_stalls_is_opened_again_when_asked(vlm: EdgeVLM) -> None:
    cameras: list[Source] = []

    def connect() -> Iterator[np.ndarray]:
        cameras.append(Source(2))
        return cameras[-1]()

    seen = vlm.watch(connect, frame_timeout=1, on_stall="reconnect", drop="none")
    assert [next(seen).index for _ in range(2)] == [0, 1]
    third = next(seen)
    assert (third.index, third.reconnects, value(third)) == (2, 1, 1)
    assert len(cameras) == 2
    for camera in cameras:
        camera.end()
    seen.close()
    assert cameras[1].closed == 1


def test_a_camera_that_disappears_is_an_error_or_opened_again(vlm: EdgeVLM) -> None:
    tries = itertools.count()

    def flaky() -> Iterator[np.ndarray]:
        yield image(next(tries))
        raise OSError("unplugged")

    with pytest.raises(CameraError, match="OSError") as caught:
        list(vlm.watch(flaky, drop="none"))
    assert isinstance(caught.value.__cause__, OSError)
    again = vlm.watch(flaky, on_stall="reconnect", drop="none")
    assert [value(next(again)) for _ in range(2)] == [1, 2]
    again.close()


def test_ctrl_c_while_waiting_for_a_frame_leaves_nothing_behind(vlm: EdgeVLM) -> None:
    camera, main = Source(), threading.get_ident()

    def interrupt() -> None:
        camera.wait(1)
        signal.pthread_kill(main, signal.SIGINT)
        camera.end()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        next(vlm.watch(camera, frame_timeout=None))
    interrupter.join()
    assert camera.closed == 1
    assert [value(one) for one in vlm.watch([image(1), image(2)])] == [1, 2]


def test_a_frame_that_cannot_be_answered_does_not_end_the_watch(vlm: EdgeVLM) -> None:
    broken: Any = np.zeros((4, 4), np.float32)
    seen = list(vlm.watch([image(1), broken, image(2)]))
    assert [one.result is None for one in seen] == [False, True, False]
    assert isinstance(seen[1].error, ImageError)
    with EdgeVLM(engine=FakeEngine.factory("word " * 500, step_s=0.01)) as slow:
        late = list(slow.watch([image(1), image(2)], timeout=0.3))
    assert [type(one.error) for one in late] == [RequestTimeout] * 2
    clips = list(vlm.watch([image(1), broken, image(2), image(3)], window=2))
    assert [type(one.error) for one in clips] == [type(None), VideoError, VideoError, type(None)]


def test_what_would_fail_for_every_frame_ends_the_watch(vlm: EdgeVLM) -> None:
    with pytest.raises(SamplingError):
        next(vlm.watch([image()], max_tokens=0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"drop": "newest"}, "drop"),
        ({"on_stall": "ignore"}, "on_stall"),
        ({"max_fps": 0}, "max_fps"),
        ({"frame_timeout": float("nan")}, "frame_timeout"),
        ({"source": ""}, "type str"),
        ({"source": -1}, "-1"),
        ({"source": True}, "index"),
        ({"source": image()}, "ndarray"),
        ({"source": "rtsp://camera/1"}, "URL"),
        ({"source": iter([]), "on_stall": "reconnect"}, "opened again"),
    ],
)
def test_nonsense_is_refused_before_anything_is_opened(
    vlm: EdgeVLM, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        vlm.watch(**{"source": [image()], **options})


def test_sources_that_are_not_there_are_reported(
    vlm: EdgeVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CameraError, match="no image"):
        next(vlm.watch(tmp_path))
    (tmp_path / "notes.mp4").write_text("no video")
    for source, match in (
        (tmp_path / "missing.mp4", "no device, file or directory"),
        (tmp_path / "notes.mp4", "cannot open"),
        ("nothing ! appsink" + " " * 300, "with GStreamer"),
    ):
        with pytest.raises(CameraError, match=match):
            next(vlm.watch(source))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependencyError, match=r"molmo-edge\[camera\]"):
        next(vlm.watch(0))


def test_opencv_frames_are_converted_to_rgb_and_the_device_is_released(
    vlm: EdgeVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    blue = np.full((4, 6, 3), (200, 0, 0), np.uint8)
    device = mock.Mock(**{"read.side_effect": [(True, blue), (True, blue), (False, None)]})
    monkeypatch.setattr(cv2, "VideoCapture", lambda *args: device)
    seen = vlm.watch("0", drop="none")
    for _ in range(2):
        assert tuple(np.asarray(next(seen).image)[0, 0]) == (0, 0, 200)
    with pytest.raises(CameraError, match="no more frames from camera 0"):
        next(seen)
    device.release.assert_called_once_with()


def test_a_video_file_is_played_at_its_own_speed_and_ends(vlm: EdgeVLM, tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 20.0, (32, 24))
    for i in range(8):
        writer.write(np.full((24, 32, 3), 30 * i, np.uint8))
    writer.release()
    began = time.monotonic()
    seen = list(vlm.watch(path))
    assert time.monotonic() - began >= 6 / 20
    assert seen[-1].index == 7
    assert sum(one.dropped for one in seen) + len(seen) == 8
    assert len(list(vlm.watch(str(path), drop="none"))) == 8


def test_awatch_answers_while_the_event_loop_goes_on_and_closes_the_source(vlm: EdgeVLM) -> None:
    async def tick(ticks: list[float]) -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.002)

    async def first_frame(camera: Source) -> None:
        await anext(vlm.awatch(camera, frame_timeout=None))

    async def check() -> None:
        ticks: list[float] = []
        ticking = asyncio.create_task(tick(ticks))
        seen = [one async for one in vlm.awatch([image(i) for i in range(5)], max_fps=50)]
        ticking.cancel()
        assert [value(one) for one in seen] == list(range(5)) and len(ticks) > 20
        assert all(one.result is not None for one in seen)
        left, waiting = Source(2), Source()
        async with contextlib.aclosing(vlm.awatch(left, drop="none")) as answers:
            await anext(answers)
            left.end()
        # Cancelled while it waits for a frame.
        task = asyncio.create_task(first_frame(waiting))
        await asyncio.to_thread(waiting.wait, 1)
        waiting.end()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left.closed == waiting.closed == 1

    asyncio.run(check())
