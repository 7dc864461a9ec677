"""`watch`: answer the same question about the newest frame of a camera, again and again.

A thread of its own opens, reads and closes the source; a camera that hangs never hangs the
consumer. Between the two are only queues written in C, so Ctrl-C leaves nothing locked.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import io
import logging
import math
import queue
import re
import stat
import threading
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard

import numpy as np

from molmo_edge.errors import (
    CameraError,
    ConfigError,
    InputError,
    MissingDependencyError,
    MolmoEdgeError,
    PromptError,
    PromptTooLongError,
    QueueFull,
    RequestError,
    SamplingError,
)
from molmo_edge.files import expand_home, file_mode
from molmo_edge.images import SUFFIXES, ImageLike, image_files, printable, private_copy
from molmo_edge.points import CountResult, PointResult
from molmo_edge.results import Result
from molmo_edge.settings import plain
from molmo_edge.video import Frame, Video

logger = logging.getLogger("molmo_edge")

Source: TypeAlias = int | str | Path | Iterable[ImageLike] | Callable[[], Iterable[ImageLike]]
Answer: TypeAlias = Result | PointResult | CountResult
_Frames: TypeAlias = Callable[[], Generator[ImageLike | None, None, None]]  # None: unreadable

# Longest wait for a thread in the middle of a read, which cannot be interrupted.
_JOIN_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0
_MAX_WINDOW = 10_000
# Failed reads of a camera in a row that end it, and the seconds between them.
_MAX_FAILURES, _FAILURE_PAUSE_S = 30, 0.02
# One image or its bytes; iterating over it would give rows, lines or numbers.
_NO_FRAMES = (
    str, bytes, bytearray, memoryview, array.array, io.IOBase, Mapping, np.ndarray,
)  # fmt: skip
_NO_THREAD = "The system has no thread left to read the source."
_CAMERA_URL = re.compile(r"\s*(rtsps?|https?)://", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Seen:
    """One frame and its answer.

    Attributes:
        image: the frame; an H x W x 3 uint8 RGB array from OpenCV, else what the source yielded.
        index: its number in the source, from 0, dropped frames counted, across reconnects.
        captured_s: when it was read, on the monotonic clock of `time.monotonic`.
        captured_at: the same in seconds since 1970.
        answered_s: when the answer was complete, monotonic.
        dropped: frames that were replaced by newer ones since the frame before.
        skipped: frames that could not be read since the source was last opened.
        reconnects: how often the source was opened again so far.
        result: the answer; None when there is an `error`.
        points: what the answer points at, if `point` or `count` was asked for.
        count: the number of what was counted.
        error: why this frame has no answer: its deadline passed, the image cannot be used, …
        video: with `window`, the frame and those before it: what the answer is about.
    """

    image: ImageLike
    index: int
    captured_s: float
    captured_at: float
    answered_s: float = 0.0
    dropped: int = 0
    skipped: int = 0
    reconnects: int = 0
    result: Result | None = None
    points: PointResult | None = None
    count: CountResult | None = None
    error: MolmoEdgeError | None = None
    video: Video | None = None

    @property
    def latency_s(self) -> float:
        """Seconds from the frame's capture to its answer, waiting included."""
        return self.answered_s - self.captured_s

    def answered(self, answer: Answer | None, error: MolmoEdgeError | None) -> Seen:
        """The frame with its answer."""
        count = answer if isinstance(answer, CountResult) else None
        points = count.points if count else answer if isinstance(answer, PointResult) else None
        result = points.result if points else answer if isinstance(answer, Result) else None
        now = time.monotonic()
        return replace(self, answered_s=now, result=result, points=points, count=count, error=error)

    def draw(self, order: Literal["RGB", "BGR"] = "RGB") -> Frame:
        """Return the upright frame with its points as a new H x W x 3 uint8 array.

        ``"BGR"`` is OpenCV's order of channels. Raises ImageError; InputError for another order.
        """
        if not isinstance(order, str) or order not in ("RGB", "BGR"):
            raise InputError("The order must be 'RGB' or 'BGR'.")
        points = self.points or PointResult("", images=(self.image,))
        refused = self.image if self.error is not None else None  # perhaps for its size
        pixels = np.array(points.draw(refused, index=len(points.images) - 1))
        return np.ascontiguousarray(pixels[..., ::-1]) if order == "BGR" else pixels


class Camera:
    """The frames of a source, one at a time, through stalls and failures.

    Nothing is opened before the first frame is asked for. The other arguments are those of
    `EdgeVLM.watch`.

    Args:
        source: one of

            - an integer, or a string of digits: an OpenCV device by index;
            - the RTSP or HTTP URL of your own camera, which OpenCV opens: what it sends is
              decoded without the limits on images and videos;
            - a string with ``!`` in it: a GStreamer pipeline that ends in ``appsink``, for an
              OpenCV with GStreamer (the wheels on PyPI have none, a Jetson's own build has);
            - the path of a device such as ``/dev/video0``, or of a video file, played at its own
              speed; as a ``Path`` if there is a ``!`` in it;
            - a directory: its images in the order of their names. It has no clock, so none of
              them is dropped. The same holds for a list or tuple of images;
            - an iterator of images (arrays are RGB, as everywhere), or a function that returns
              one, which can be called again to reconnect. Each image is copied before the next is
              asked for, of a path its file; None is a frame that could not be read.

            A camera may fail to read some frames; 30 in a row are an error.

    Raises:
        ConfigError: `source` is none of these, or another argument is wrong.
    """

    _reader: _Reader | None = None

    def __init__(
        self,
        source: Source,
        drop: Literal["oldest", "none"] = "oldest",
        max_fps: float | None = None,
        frame_timeout: float | None = 10.0,
        on_stall: Literal["raise", "reconnect"] = "raise",
        window: int | None = None,
    ) -> None:
        if not isinstance(drop, str) or drop not in ("oldest", "none"):
            raise ConfigError("drop must be 'oldest' or 'none'.")
        if not isinstance(on_stall, str) or on_stall not in ("raise", "reconnect"):
            raise ConfigError("on_stall must be 'raise' or 'reconnect'.")
        max_fps, frame_timeout, window = map(plain, (max_fps, frame_timeout, window))
        for name, value in (("max_fps", max_fps), ("frame_timeout", frame_timeout)):
            number = isinstance(value, int | float)
            if value is not None and not (number and type(value) is not bool and 0 < value < 1e9):
                raise ConfigError(f"{name} must be a positive number below 1e9, or None.")
        if window is not None and not (type(window) is int and 2 <= window <= _MAX_WINDOW):
            raise ConfigError(f"window must be an integer from 2 to {_MAX_WINDOW}, or None.")
        self._open_frames, clocked = _frames_of(source)
        self._reconnect = on_stall == "reconnect"
        if self._reconnect and isinstance(source, Iterator):
            raise ConfigError(
                "An iterator cannot be opened again; for on_stall='reconnect' give a function "
                "that returns one."
            )
        self._keep_all = drop == "none" or not clocked
        self._period_s = 0.0 if max_fps is None else 1 / max_fps
        self._window = window
        self._timeout_s = math.inf if frame_timeout is None else frame_timeout
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._due_s = 0.0  # no frame is due before
        self._pause_s = _FIRST_PAUSE_S
        self._first = 0  # number of the reader's first frame across reconnects
        self._next = 0
        self._reconnects = 0
        self._closed = False

    def next_frame(self) -> Seen | None:
        """Wait for a frame; None where the source ends or after `close`. Raises CameraError."""
        while not self._closed:
            if (wait_s := self._due_s - time.monotonic()) > 0:
                _wait(self._news, wait_s)
                continue
            reader = self._reader or self._start_reader()
            try:
                frame = reader.next_frame(self._timeout_s)
            except CameraError as exc:
                reader.stop()
                self._reader = None  # one that hangs in a read is not waited for
                if not self._reconnect:
                    raise
                logger.warning("%s Opening it again in %.1f s.", exc, self._pause_s)
                self._first = self._next = self._first + reader.count
                self._reconnects += 1
                self._due_s = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
                continue
            if frame is None:
                break
            self._pause_s = _FIRST_PAUSE_S
            self._due_s = time.monotonic() + self._period_s
            index = self._first + frame.index
            dropped, self._next = index - self._next, index + 1
            return replace(frame, index=index, dropped=dropped, reconnects=self._reconnects)
        return None

    def stop(self) -> None:
        """Begin to close, and wake `next_frame` in another thread."""
        self._closed = True
        if self._reader is not None:
            self._reader.stop()
        self._news.put(None)

    def close(self) -> None:
        """Close the source and wait for its thread."""
        self.stop()
        if self._reader is not None and self._reader.thread.is_alive():
            self._reader.thread.join(_JOIN_S)

    def __del__(self) -> None:
        if self._reader is not None:  # Ctrl-C came before `close` could stop it
            self._reader.stop()

    def _start_reader(self) -> _Reader:
        self._reader = reader = _Reader(
            self._open_frames, self._keep_all, self._news, self._window, self._period_s
        )
        if self._closed:  # meanwhile, in another thread
            reader.stop()
        else:
            try:
                reader.thread.start()  # once `close` knows it, for Ctrl-C in here
            except RuntimeError as exc:
                raise CameraError(_NO_THREAD) from exc
        return reader


def run(camera: Camera, answer: Callable[[Seen], Answer]) -> Generator[Seen, None, None]:
    """Answer frame by frame; see `EdgeVLM.watch`."""
    with contextlib.closing(camera):
        while (frame := camera.next_frame()) is not None:
            try:
                seen = frame.answered(answer(frame), None)
            except (InputError, RequestError, QueueFull) as exc:
                seen = _failed(frame, exc)
            yield seen


async def arun(
    camera: Camera, answer: Callable[[Seen], Awaitable[Answer]]
) -> AsyncGenerator[Seen, None]:
    """Do the same as `run` for asyncio; see `EdgeVLM.awatch`."""
    # Cameras that wait in asyncio's own threads would leave none to other requests.
    waiter = ThreadPoolExecutor(1, "molmo-edge-awatch")
    try:
        waiter.submit(int)  # starts its only thread
    except RuntimeError as exc:
        raise CameraError(_NO_THREAD) from exc
    in_waiter = partial(asyncio.get_running_loop().run_in_executor, waiter)
    try:
        while (frame := await in_waiter(camera.next_frame)) is not None:
            try:
                seen = frame.answered(await answer(frame), None)
            except (InputError, RequestError, QueueFull) as exc:
                seen = _failed(frame, exc)
            yield seen
    finally:
        camera.stop()  # ends a wait in the thread that then closes
        await in_waiter(camera.close)
        waiter.shutdown(wait=False)


def _failed(frame: Seen, error: MolmoEdgeError) -> Seen:
    """The frame with its error; the question's own, which every frame would have, is raised."""
    of_frame = isinstance(error, PromptTooLongError)  # fewer crops or frames may fit
    if isinstance(error, PromptError | SamplingError) and not of_frame:
        raise error
    return frame.answered(None, error)


class _Reader:
    """The thread that opens, reads and closes a source, and the one frame that waits."""

    def __init__(
        self,
        open_frames: _Frames,
        keep_all: bool,
        news: queue.SimpleQueue[None],
        window: int | None,
        period_s: float,
    ) -> None:
        self._open_frames = open_frames
        self._keep_all = keep_all
        self._news = news
        self._period_s = period_s
        self._recent: deque[tuple[float, ImageLike]] = deque(maxlen=window or 0)
        self._waiting: deque[Seen] = deque(maxlen=1)
        self._resume: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._since = time.monotonic()  # when the source last gave a frame, or was asked for one
        self._stopped = False
        self._finished = False
        self._failure: MolmoEdgeError | None = None
        self.count = self._skipped = 0
        self.thread = threading.Thread(target=self._run, name="molmo-edge-camera", daemon=True)

    def next_frame(self, timeout_s: float) -> Seen | None:
        """Wait for a frame; None where the source ends. Raises CameraError at a stall."""
        while not self._stopped:
            # In this order: a frame that came before the end is still given.
            finished = self._finished
            left_s = self._since + timeout_s - time.monotonic()
            if self._waiting and (left_s > 0 or finished or self._keep_all):
                frame = self._waiting.popleft()
                if self._keep_all:
                    self._since = time.monotonic()
                    self._resume.put(None)
                return frame
            if finished and self._failure is not None:
                raise self._failure
            if finished:
                break
            if left_s <= 0:
                raise CameraError(
                    f"The source has given no frame for {timeout_s:g} s. Check the camera, raise "
                    "frame_timeout, or watch with on_stall='reconnect'."
                )
            _wait(self._news, left_s)
        return None

    def stop(self) -> None:
        self._stopped = True
        self._resume.put(None)

    def _run(self) -> None:
        try:
            with contextlib.closing(self._open_frames()) as frames:
                for image in frames:
                    if image is None:
                        self._skipped += 1
                    elif not self._stopped:
                        self._add(image)
                    if self._stopped:
                        break
        except MolmoEdgeError as exc:
            self._failure = exc
        except BaseException as exc:  # SystemExit and CancelledError end only this thread
            self._failure = CameraError(
                f"The source failed: {type(exc).__name__}. The chained error says why."
            )
            self._failure.__cause__ = exc
        self._finished = True
        self._notify()

    def _add(self, image: ImageLike) -> None:
        now = time.monotonic()
        if not self._keep_all:
            self._since = now
        video = self._video(now, image)
        frame = Seen(image, self.count, now, time.time(), skipped=self._skipped, video=video)
        self._waiting.append(frame)
        self.count += 1
        self._notify()
        if self._keep_all:
            self._resume.get()

    def _video(self, now: float, image: ImageLike) -> Video | None:
        """The window that ends with this image; the others are a period apart."""
        if not self._recent.maxlen:
            return None
        if len(self._recent) > 1 and self._recent[-1][0] - self._recent[-2][0] < self._period_s:
            self._recent.pop()
        # A copy: the consumer may draw on the frame it gets.
        self._recent.append((now, private_copy(image)))
        times, frames = zip(*self._recent, strict=True)
        return Video(frames, timestamps=[t - times[0] for t in times], skip_broken=True)

    def _notify(self) -> None:
        if self._news.empty():
            self._news.put(None)


def _wait(news: queue.SimpleQueue[None], seconds: float) -> None:
    with contextlib.suppress(queue.Empty):
        news.get(timeout=min(seconds, 3600.0))


def _frames_of(source: Source) -> tuple[_Frames, bool]:
    """Return how to open a source, and whether it has a clock: its frames come by themselves."""
    source = plain(source)
    if isinstance(source, str) and re.fullmatch(r"\s*\d{1,9}\s*", source):
        source = int(source)
    if type(source) is int and 0 <= source < 1e9:
        return lambda: _read_opencv(source, f"camera {source}"), True
    if isinstance(source, str) and _CAMERA_URL.match(source):
        # Not named: the URL may have a password in it.
        return lambda: _read_opencv(source.strip(), "the camera's URL"), True
    if isinstance(source, str) and "!" in source:
        return lambda: _read_opencv(source, "the GStreamer pipeline", "CAP_GSTREAMER"), True
    if isinstance(source, str) and "://" in source:
        raise ConfigError(
            "Only rtsp, rtsps, http and https URLs of cameras are opened. Give a GStreamer "
            "pipeline, or an iterator of images."
        )
    if isinstance(source, str | Path) and str(source).strip():
        path = expand_home(source)
        if stat.S_ISDIR(file_mode(path)):
            return lambda: _read_directory(path), False
        if path.suffix.lower() in SUFFIXES and stat.S_ISREG(file_mode(path)):
            return lambda: _iterate([path]), False
        return lambda: _read_path(path), True
    if isinstance(source, list | tuple):
        return lambda: _iterate(source), False
    if _are_frames(source):
        return lambda: _iterate(source), True
    if callable(source):
        return lambda: _iterate(_called(source)), True
    raise ConfigError(
        "A source is a camera's index (0 or more) or URL, a device, video file, directory or "
        "GStreamer pipeline by name, or an iterator of images; not this value of type "
        f"{type(source).__name__}."
    )


def _are_frames(value: object) -> TypeGuard[Iterable[ImageLike]]:
    return isinstance(value, Iterable) and not isinstance(value, _NO_FRAMES)


def _called(source: Callable[[], Iterable[ImageLike]]) -> Iterable[ImageLike]:
    if not _are_frames(frames := source()):
        kind = type(frames).__name__
        raise ConfigError(f"A function as source must return an iterator of images, not {kind}.")
    return frames


def _read_directory(directory: Path) -> Generator[ImageLike, None, None]:
    files = image_files(directory)
    if not files:
        raise CameraError(
            f"The directory {printable(directory)} holds no image (JPEG, PNG, WebP or BMP)."
        )
    yield from files


def _iterate(source: Iterable[ImageLike | None]) -> Generator[ImageLike | None, None, None]:
    refills = not isinstance(source, list | tuple)  # cameras often fill one buffer again and again
    frames = iter(source)
    try:
        for frame in frames:
            yield private_copy(frame) if refills and frame is not None else frame
    finally:
        close = getattr(frames, "close", None)
        if close is not None:
            close()


def _read_path(path: Path) -> Generator[ImageLike | None, None, None]:
    if not file_mode(path):
        raise CameraError(f"There is no device, file or directory {printable(path)}.")
    return _read_opencv(str(path), printable(path), is_file=stat.S_ISREG(file_mode(path)))


def _read_opencv(
    target: int | str, shown: str, backend: str = "CAP_ANY", *, is_file: bool = False
) -> Generator[ImageLike | None, None, None]:
    """Yield RGB frames of what ``cv2.VideoCapture`` opens, None for those it fails to read."""
    try:
        import cv2
    except ImportError as exc:
        raise MissingDependencyError(
            'Cameras and video files need OpenCV: pip install "molmo-edge[camera]". An iterator of '
            "images needs nothing."
        ) from exc
    capture: Any = cv2.VideoCapture(target, getattr(cv2, backend))
    try:
        if not capture.isOpened():
            raise CameraError(
                f"OpenCV cannot open {shown}; is it there, and free? A pipeline needs an OpenCV "
                "with GStreamer, which the wheels on PyPI are not."
            )
        fps = capture.get(cv2.CAP_PROP_FPS) if is_file else 0.0
        due = time.monotonic()
        codes = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}
        failures, empty = 0, True
        while failures < _MAX_FAILURES:
            success, frame = capture.read()
            if not success or frame is None or not frame.size:
                failures += 1
                yield None
                time.sleep(0 if is_file else _FAILURE_PAUSE_S)
                continue
            failures, empty = 0, False
            yield cv2.cvtColor(frame, codes[1 if frame.ndim == 2 else frame.shape[2]])
            if 0 < fps < 1000:
                due = max(due + 1 / fps, time.monotonic())
                time.sleep(max(0.0, due - time.monotonic()))
        if empty or not is_file:
            raise CameraError(f"OpenCV reads no more frames from {shown}.")
    finally:
        capture.release()
