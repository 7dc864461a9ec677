"""`watch`: always the newest frame, drops counted, stalls reported, no thread left."""

from __future__ import annotations

import array
import asyncio
import contextlib
import io
import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine, Fault
from molmo_edge.errors import (
    CameraError,
    ConfigError,
    ImageError,
    InputError,
    MissingDependencyError,
    PromptError,
    PromptTooLongError,
    RequestTimeout,
    SamplingError,
    VideoError,
)
from molmo_edge.images import ImageLimits, load
from molmo_edge.watch import Camera, Seen
from tests.engine.support import eventually, meanwhile
from tests.image_files import encode

cv2 = pytest.importorskip("cv2")
ANSWERS = "A cup."


def image(value: int = 0) -> np.ndarray:
    return np.full((8, 12, 3), value, np.uint8)


def value(seen: Seen) -> int:
    return int(np.asarray(seen.image)[0, 0, 0])


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    names = {"molmo-edge-camera"}
    eventually(lambda: names.isdisjoint(thread.name for thread in threading.enumerate()))


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
    for name in ("notes.txt", "._0.png", ".hidden.png"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "directory.png").mkdir()
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


FILLED = ["array", "bytearray", "memoryview", "file", "lazy", "path", "painted", "over a buffer"]


def refilled(kind: str, directory: Path) -> Iterator[Any]:
    """Frames of values 0 to 2, all in the memory, or file, of the first."""
    array, grey = image(), np.zeros((8, 12), np.uint8)
    file, path = io.BytesIO(), directory / "latest.bmp"
    data = bytearray(encode(Image.fromarray(array), "BMP"))
    sources = {
        "array": array,
        "bytearray": data,
        "memoryview": memoryview(data),
        "file": file,
        "lazy": None,
        "path": path,
        "painted": Image.fromarray(array),
        "over a buffer": Image.frombuffer("L", (12, 8), grey, "raw", "L", 0, 1),
    }
    for i in range(3):
        array[:] = grey[:] = i
        sources["painted"].paste((i, i, i), (0, 0, 12, 8))
        data[:] = encode(Image.fromarray(array), "BMP")
        path.write_bytes(data)
        file.seek(0)
        file.write(data)
        file.seek(0)
        yield Image.open(file) if kind == "lazy" else sources[kind]


@pytest.mark.parametrize("kind", FILLED)
def test_a_buffer_that_is_filled_again_does_not_change_a_frame(kind: str, tmp_path: Path) -> None:
    def answer(turns: Any) -> str:
        frames = turns[0].video.frames if turns[0].video else turns[0].images
        return str([int(np.asarray(frame)[0, 0, 0]) for frame in frames])

    class Iterable:
        def __iter__(self) -> Iterator[Any]:
            return refilled(kind, tmp_path)

    with EdgeVLM(engine=FakeEngine.factory(answer)) as vlm:
        for source, window, answers in (
            (Iterable().__iter__, None, "[0] [1] [2]"),
            (Iterable(), None, "[0] [1] [2]"),
            (iter(Iterable()), 2, "[0] [0, 1] [1, 2]"),
        ):
            seen = list(vlm.watch(source, drop="none", window=window))
            assert " ".join(str(one.result) for one in seen) == answers
            assert [load(one.image).getpixel((0, 0))[0] for one in seen] == [0, 1, 2]


def test_drawing_on_a_frame_does_not_change_later_windows(vlm: EdgeVLM) -> None:
    for one in vlm.watch(iter([image(1), image(1)]), drop="none", window=2):
        assert values(one)[0] == 1
        np.asarray(one.image)[:] = 9


POINT = '<point x="25.0" y="50.0" alt="mug">mug</point>'


def test_watch_points_counts_and_draws() -> None:
    answers = {"Point to mug": POINT, "How many mug are there?": f"{POINT} shows a total of 1."}
    with EdgeVLM(engine=FakeEngine.factory(answers)) as vlm:
        frames = [np.full((60, 80, 3), (200, 0, 0), np.uint8), b"broken"]
        seen, broken = vlm.watch(frames, point=" Mug")
        assert seen.points is not None and seen.count is None and seen.result is not None
        assert [one.px((80, 60)) for one in seen.points.points] == [(20, 30)]
        drawn, bgr = seen.draw(), seen.draw("BGR")
        assert tuple(drawn[0, 0]) == (200, 0, 0) and tuple(bgr[0, 0]) == (0, 0, 200)
        assert np.array_equal(drawn[..., ::-1], bgr) and bgr.flags.c_contiguous
        assert tuple(drawn[30, 20]) != (200, 0, 0)
        with pytest.raises(InputError, match="BGR"):
            seen.draw("bgr")  # type: ignore[arg-type]
        assert broken.points is None and isinstance(broken.error, ImageError)
        # With a window the points are those of the newest frame.
        answers["Point to mug"] = '<points coords="0.0 1 250 500;0.9 2 750 500">mug</points>'
        first, last = vlm.watch(frames[:1] * 2, point="mug", window=2, max_fps=20)
        assert [is_painted(one.draw()) for one in (first, last)] == [[True, True], [False, True]]

        async def count() -> list[Seen]:
            return [one async for one in vlm.awatch(frames[:1], count="mug")]

        [counted] = asyncio.run(count())
        assert counted.count is not None and counted.count.number == 1
        assert counted.points is counted.count.points
        for wrong in ({"point": "a", "count": "b"}, {"question": "q", "point": "a"}):
            with pytest.raises(ConfigError):
                vlm.watch(frames, **wrong)
        for wrong in ({"point": ""}, {"count": "<"}):
            with pytest.raises(PromptError):
                vlm.watch(frames, **wrong)


def test_a_frame_that_was_answered_is_drawn_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molmo_edge.points.DEFAULT_LIMITS", ImageLimits(10**6, 1000))
    with EdgeVLM(engine=FakeEngine.factory(POINT), max_image_pixels=4800) as vlm:
        frames = [np.zeros((60, 80, 3), np.uint8), np.zeros((61, 80, 3), np.uint8)]
        for asked in ({"point": "mug"}, {"question": "q"}, {"point": "mug", "window": 2}):
            answered, refused = vlm.watch(frames, **asked)
            assert answered.draw().shape == (60, 80, 3)
            with pytest.raises(ImageError, match="max_image_pixels"):
                refused.draw()
        answer = vlm.point(frames[0], "mug")
        assert answer.draw().size == (80, 60)
        with pytest.raises(ImageError, match="pixels"):
            answer.draw(frames[0])


def is_painted(frame: np.ndarray) -> list[bool]:
    return [tuple(frame[30, column]) != (200, 0, 0) for column in (20, 60)]


def test_latency_counts_the_wait_for_earlier_frames() -> None:
    with contextlib.closing(Camera([image(1), image(2)])) as camera:
        first = camera.next_frame()
        assert first is not None and camera._reader is not None
        eventually(lambda: camera._reader and camera._reader._waiting)
        answered = first.answered(None, None)
        second = camera.next_frame()
        assert second is not None and second.captured_s <= answered.answered_s
        second = second.answered(None, None)
        assert second.latency_s == second.answered_s - second.captured_s
        assert second.answered_s >= answered.answered_s


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


@pytest.mark.parametrize("end", [SystemExit, asyncio.CancelledError, MemoryError])
def test_a_source_that_dies_of_anything_is_an_error(vlm: EdgeVLM, end: Any) -> None:
    def dying() -> Iterator[np.ndarray]:
        yield image()
        raise end

    with pytest.raises(CameraError, match=end.__name__) as caught:
        list(vlm.watch(dying, drop="none", frame_timeout=None))
    assert isinstance(caught.value.__cause__, end)


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

    with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
        next(vlm.watch(camera, frame_timeout=None))
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
    clips = list(vlm.watch([image(1), broken, image(2), image(3)], window=3))
    assert [type(one.error) for one in clips] == [type(None), VideoError, type(None), type(None)]


@pytest.mark.parametrize("error", [PromptTooLongError("x"), ValueError("x"), PromptError("x")])
def test_a_frame_that_cannot_be_rendered_does_not_end_the_watch_but_a_question_does(
    error: Exception,
) -> None:
    with EdgeVLM(engine=FakeEngine.factory("A cup.", faults=[Fault("render", error, 2)])) as vlm:
        seen = vlm.watch([image()] * 4, "q")
        if type(error) is PromptError:
            with pytest.raises(PromptError):
                list(seen)
        else:
            refused = [isinstance(one.error, InputError) for one in seen]
            assert refused == [False, True, False, False]


def test_what_would_fail_for_every_frame_is_refused_at_once(vlm: EdgeVLM) -> None:
    wrong: list[dict[str, Any]] = [{"max_tokens": 0}, {"video": b""}, {"image": image()}]
    for options in [*wrong, {"question": " "}, {"question": image()}]:
        with pytest.raises(PromptError if "question" in options else SamplingError):
            vlm.watch(Source(), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"drop": "newest"}, "drop"),
        ({"drop": image()}, "drop"),
        ({"on_stall": "ignore"}, "on_stall"),
        ({"max_fps": 0}, "max_fps"),
        ({"frame_timeout": float("nan")}, "frame_timeout"),
        ({"frame_timeout": 10**400}, "frame_timeout"),
        ({"source": ""}, "type str"),
        ({"source": -1}, "index"),
        ({"source": True}, "index"),
        ({"source": image()}, "ndarray"),
        ({"source": "file:///etc/passwd"}, "URL"),
        ({"source": io.BytesIO()}, "BytesIO"),
        ({"source": array.array("B", b"x")}, "array"),
        ({"source": 10**5000}, "index"),
        ({"max_fps": True}, "max_fps"),
        ({"window": 10**30}, "window"),
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
    with pytest.raises(CameraError, match=f"{tmp_path.name}' holds no image"):
        next(vlm.watch(tmp_path))
    (tmp_path / "notes.mp4").write_text("no video")
    for source, match in (
        (tmp_path / "missing\u00a0\u3000.mp4", "file or directory '.*missing\u00a0\u3000.mp4'"),
        ("x" * 300, "no device, file or directory '…x{200}'"),
        ("9" * 5000, "no device, file or directory"),
        (tmp_path / "notes.mp4", "cannot open"),
        ("nothing ! appsink" + " " * 300, "with GStreamer"),
    ):
        with pytest.raises(CameraError, match=match):
            next(vlm.watch(source))
    for frame in (5, image(), "images/"):
        with pytest.raises(ConfigError, match=f"images, not {type(frame).__name__}"):
            next(vlm.watch(lambda frame=frame: frame, on_stall="reconnect"))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependencyError, match=r"molmo-edge\[camera\]"):
        next(vlm.watch(0))


def test_opencv_frames_are_converted_to_rgb_and_the_device_is_released(
    vlm: EdgeVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    blue = np.full((4, 6, 3), (200, 0, 0), np.uint8)
    good, bad = (True, blue), [(False, None), (True, None), (True, blue[:0])]
    for source, opened, name in (
        ("0", 0, "camera 0"),
        (np.int64(1), 1, "camera 1"),
        (" RTSP://me:secret!@host/1 ", "RTSP://me:secret!@host/1", "the camera's URL"),
    ):
        reads = itertools.chain([*bad, good, good, bad[0], good], itertools.repeat(bad[0]))
        device = mock.Mock(**{"read.side_effect": reads})
        opener = mock.Mock(return_value=device)
        monkeypatch.setattr("molmo_edge.watch._FAILURE_PAUSE_S", 0)
        monkeypatch.setattr(cv2, "VideoCapture", opener)
        seen = vlm.watch(source, drop="none")
        for skipped in (3, 3, 4):
            one = next(seen)
            assert tuple(np.asarray(one.image)[0, 0]) == (0, 0, 200)
            assert (one.skipped, one.dropped) == (skipped, 0)
        with pytest.raises(CameraError, match=f"no more frames from {name}"):
            next(seen)
        opener.assert_called_once_with(opened, cv2.CAP_ANY)
        device.release.assert_called_once_with()
    seen = vlm.watch(iter([None, image(1), None, None, image(2)]), drop="none")
    assert [(value(one), one.index, one.skipped) for one in seen] == [(1, 0, 1), (2, 1, 3)]


def write_clip(path: Path, codec: str, fps: float, frames: np.ndarray) -> Path:
    size = frames.shape[2], frames.shape[1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, size)
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def test_a_broken_frame_does_not_end_a_video_file(vlm: EdgeVLM, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)
    path = write_clip(tmp_path / "clip.mp4", "mp4v", 500.0, noise)
    data = path.read_bytes()
    third, sixth = len(data) // 3, len(data) // 6
    path.write_bytes(data[:third] + bytes(sixth) + data[third + sixth :])
    seen = list(vlm.watch(path, drop="none"))
    assert len(seen) > 8 and seen[0].skipped == 0 < seen[-1].skipped


def test_a_video_file_is_played_at_its_own_speed_and_ends(vlm: EdgeVLM, tmp_path: Path) -> None:
    frames = np.stack([np.full((24, 32, 3), 30 * i, np.uint8) for i in range(8)])
    path = write_clip(tmp_path / "clip.avi", "MJPG", 20.0, frames)
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


def test_cameras_that_wait_leave_asyncios_threads_to_other_requests(vlm: EdgeVLM) -> None:
    async def check() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        camera = Source()
        watching = asyncio.create_task(anext(vlm.awatch(camera, frame_timeout=None)))
        await asyncio.sleep(0)
        answer = await asyncio.wait_for(vlm.aquery(None, "q"), 60)
        assert answer.text and not watching.done()
        camera.end()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(check())
