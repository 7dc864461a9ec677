"""`watch`: answer the same question about the newest frame of a camera, again and again.

A thread of its own opens, reads and closes the source; the consumer never blocks on a camera.
Between the two are only queues written in C, so Ctrl-C in the consumer leaves nothing locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from molmo_edge.errors import (
    CameraError,
    ConfigError,
    ImageError,
    MissingDependencyError,
    MolmoEdgeError,
    QueueFull,
    RequestError,
)
from molmo_edge.images import SUFFIXES, ImageLike, image_files
from molmo_edge.results import Result

logger = logging.getLogger("molmo_edge")

Source: TypeAlias = int | str | Path | Iterable[ImageLike] | Callable[[], Iterable[ImageLike]]

# Failures that belong to one frame; the next one may be answered.
_FRAME_ERRORS = (ImageError, RequestError, QueueFull)
# Longest wait for a thread in the middle of a read. One that has stalled is not waited for: its
# read cannot be interrupted, and it ends by itself when that returns.
_JOIN_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0
# One image or its bytes; iterating over it would give rows or numbers.
_NO_FRAMES = (str, bytes, bytearray, memoryview, Mapping, np.ndarray)


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
        reconnects: how often the source was opened again so far.
        result: the answer; None when there is an `error`.
        error: why this frame has no answer: its deadline passed, the image cannot be used, …
    """

    image: ImageLike
    index: int
    captured_s: float
    captured_at: float
    answered_s: float = 0.0
    dropped: int = 0
    reconnects: int = 0
    result: Result | None = None
    error: MolmoEdgeError | None = None

    @property
    def latency_s(self) -> float:
        """Seconds from the frame to its answer."""
        return self.answered_s - self.captured_s


@dataclass(frozen=True)
class WatchOptions:
    """How to watch; see `EdgeVLM.watch`. Nothing is opened yet.

    Args:
        source: one of

            - an integer, or a string of digits: an OpenCV device by index;
            - a string with ``!`` in it: a GStreamer pipeline that ends in ``appsink``, for an
              OpenCV with GStreamer (the wheels on PyPI have none, a Jetson's own build has);
            - the path of a device such as ``/dev/video0``, or of a video file, played at its own
              speed;
            - a directory: its images in the order of their names. It has no clock, so none of
              them is dropped. The same holds for a list or tuple of images;
            - an iterator of images (arrays are RGB, as everywhere), or a function that returns
              one, which can be called again to reconnect.

    Raises:
        ConfigError: `source` is none of these, or another option is wrong.
    """

    source: Source
    drop: Literal["oldest", "none"] = "oldest"
    max_fps: float | None = None
    frame_timeout: float | None = 10.0
    on_stall: Literal["raise", "reconnect"] = "raise"

    def __post_init__(self) -> None:
        if self.drop not in ("oldest", "none"):
            raise ConfigError("drop must be 'oldest' or 'none'.")
        if self.on_stall not in ("raise", "reconnect"):
            raise ConfigError("on_stall must be 'raise' or 'reconnect'.")
        for name, value in (("max_fps", self.max_fps), ("frame_timeout", self.frame_timeout)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ConfigError(f"{name} must be a positive number, or None.")
        feed = open_source(self.source)
        if self.on_stall == "reconnect" and not feed.reopens:
            raise ConfigError(
                "An iterator cannot be opened again; for on_stall='reconnect' give a function "
                "that returns one."
            )


def run(
    options: WatchOptions, answer: Callable[[ImageLike], Result]
) -> Generator[Seen, None, None]:
    """Answer frame by frame; see `EdgeVLM.watch`."""
    news: queue.SimpleQueue[None] = queue.SimpleQueue()

    def notify() -> None:
        if news.empty():
            news.put(None)

    camera = _Camera(options, notify)
    try:
        while True:
            frame = camera.poll()
            if camera.ended:
                return
            if frame is None:
                with contextlib.suppress(queue.Empty):
                    news.get(timeout=camera.wait_s())
                continue
            result, error = None, None
            try:
                result = answer(frame.image)
            except _FRAME_ERRORS as exc:
                error = exc
            yield camera.seen(frame, result, error)
    finally:
        camera.close()


async def arun(
    options: WatchOptions, answer: Callable[[ImageLike], Awaitable[Result]]
) -> AsyncGenerator[Seen, None]:
    """Do the same as `run` for asyncio; see `EdgeVLM.awatch`."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        with contextlib.suppress(RuntimeError):  # the event loop may have ended
            loop.call_soon_threadsafe(news.set)

    camera = _Camera(options, notify)
    try:
        while True:
            news.clear()
            frame = camera.poll()
            if camera.ended:
                return
            if frame is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), camera.wait_s())
                continue
            result, error = None, None
            try:
                result = await answer(frame.image)
            except _FRAME_ERRORS as exc:
                error = exc
            yield camera.seen(frame, result, error)
    finally:
        await asyncio.to_thread(camera.close)


class _Capture:
    """The thread that reads one feed, and the one frame that waits."""

    def __init__(self, feed: Feed, keep_all: bool, notify: Callable[[], None]) -> None:
        self._feed = feed
        self._keep_all = keep_all
        self._notify = notify
        self._waiting: deque[Seen] = deque(maxlen=1)
        self._resume: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopped = False
        self.count = 0
        self.finished = False
        self.failure: MolmoEdgeError | None = None
        self.since = time.monotonic()  # when the source last gave a frame, or was asked for one
        self.thread = threading.Thread(target=self._run, name="molmo-edge-camera", daemon=True)

    def take(self) -> Seen | None:
        try:
            frame = self._waiting.popleft()
        except IndexError:
            return None
        if self._keep_all:
            self.since = time.monotonic()
            self._resume.put(None)
        return frame

    def stop(self) -> None:
        self._stopped = True
        self._resume.put(None)

    def _run(self) -> None:
        try:
            with contextlib.closing(self._feed.frames()) as frames:
                for image in frames:
                    if not self._stopped:
                        self._add(image)
                    if self._stopped:
                        break
        except MolmoEdgeError as exc:
            self.failure = exc
        except Exception as exc:
            self.failure = CameraError(
                f"The source failed: {type(exc).__name__}. The chained error says why."
            )
            self.failure.__cause__ = exc
        self.finished = True
        self._notify()

    def _add(self, image: ImageLike) -> None:
        now = time.monotonic()
        if not self._keep_all:
            self.since = now
        self._waiting.append(Seen(image, self.count, now, time.time()))
        self.count += 1
        self._notify()
        if self._keep_all:
            self._resume.get()


class _Camera:
    """The current capture, its deadlines, and its successors after a failure; never blocks."""

    def __init__(self, options: WatchOptions, notify: Callable[[], None]) -> None:
        self._options = options
        self._notify = notify
        self._feed = open_source(options.source, realtime=options.drop == "oldest")
        self._keep_all = options.drop == "none" or not self._feed.clocked
        self._capture: _Capture | None = None
        self._due_s = 0.0  # no frame is due before
        self._pause_s = _FIRST_PAUSE_S
        self._first = 0  # number of this capture's first frame across reconnects
        self._next = 0
        self._reconnects = 0
        self.ended = False

    def poll(self) -> Seen | None:
        """Return a frame that is due now. Sets `ended` at the end; raises CameraError."""
        now = time.monotonic()
        if now < self._due_s:
            return None
        if self._capture is None:
            self._capture = _Capture(self._feed, self._keep_all, self._notify)
            self._capture.thread.start()  # once it is known to `close`, for Ctrl-C in here
        capture = self._capture
        # In this order: a frame that came before the end is still given.
        finished, stalled = capture.finished, self._left_s(now) <= 0
        if not stalled or finished or self._keep_all:
            if (frame := capture.take()) is not None:
                self._pause_s = _FIRST_PAUSE_S
                self._due_s = now + 1 / (self._options.max_fps or math.inf)
                return frame
        if finished and capture.failure is None:
            self.ended = True
        elif finished or stalled:
            self._fail(capture, now)
        return None

    def wait_s(self) -> float:
        """Seconds after which to poll again though there was no notice."""
        now = time.monotonic()
        due = self._due_s - now
        return min(due if due > 0 else max(0.0, self._left_s(now)), 3600.0)

    def seen(self, frame: Seen, result: Result | None, error: MolmoEdgeError | None) -> Seen:
        """Complete a frame with its answer."""
        index = self._first + frame.index
        dropped, self._next = index - self._next, index + 1
        return replace(
            frame,
            index=index,
            answered_s=time.monotonic(),
            dropped=dropped,
            reconnects=self._reconnects,
            result=result,
            error=error,
        )

    def close(self) -> None:
        if self._capture is not None:
            self._capture.stop()
            if self._capture.thread.is_alive():
                self._capture.thread.join(_JOIN_S)

    def _left_s(self, now: float) -> float:
        if self._options.frame_timeout is None or self._capture is None:
            return math.inf
        return self._capture.since + self._options.frame_timeout - now

    def _fail(self, capture: _Capture, now: float) -> None:
        error = capture.failure or CameraError(
            f"The source has given no frame for {self._options.frame_timeout:g} s. Check the "
            "camera, raise frame_timeout, or watch with on_stall='reconnect'."
        )
        capture.stop()
        self._capture = None
        if self._options.on_stall != "reconnect" or not isinstance(error, CameraError):
            raise error
        logger.warning("%s Opening it again in %.1f s.", error, self._pause_s)
        self._first = self._next = self._first + capture.count
        self._reconnects += 1
        self._due_s = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


@dataclass(frozen=True)
class Feed:
    """A source of frames.

    Attributes:
        frames: opens the source, yields its frames and closes it, all in the thread that iterates.
            Raises CameraError, and MissingDependencyError without OpenCV.
        clocked: frames come by themselves and are lost when nobody reads them.
        reopens: `frames` can be called again after a failure.
    """

    frames: Callable[[], Generator[ImageLike, None, None]]
    clocked: bool = True
    reopens: bool = True


def open_source(source: Source, *, realtime: bool = True) -> Feed:
    """Return the feed of a source, not opened yet; see `WatchOptions`. Raises ConfigError.

    A video file is played at its own speed, unless `realtime` is false.
    """
    if isinstance(source, str) and source.strip().isdecimal():
        source = int(source)
    if isinstance(source, int) and not isinstance(source, bool) and source >= 0:
        return Feed(lambda: _read_opencv(source))
    if isinstance(source, str | Path) and str(source).strip():
        return _open_name(source, realtime)
    if isinstance(source, list | tuple):
        return Feed(lambda: _iterate(source), clocked=False)
    if isinstance(source, Iterator):
        return Feed(lambda: _iterate(source), reopens=False)
    if callable(source):
        return Feed(lambda: _iterate(source()))
    if isinstance(source, Iterable) and not isinstance(source, _NO_FRAMES):
        return Feed(lambda: _iterate(source))
    shown = source if isinstance(source, int) else f"a value of type {type(source).__name__}"
    raise ConfigError(
        "A source is a camera's index, a device, video file, directory or GStreamer pipeline by "
        f"name, or an iterator of images; not {shown}."
    )


def _open_name(source: str | Path, realtime: bool) -> Feed:
    name, path = str(source), Path(source)
    if isinstance(source, str) and not path.exists():
        if "!" in name:
            return Feed(lambda: _read_opencv(name, pipeline=True))
        if "://" in name:
            raise ConfigError(
                "A source is not a URL: nothing is fetched. Give a GStreamer pipeline, such as "
                "'rtspsrc location=… ! … ! appsink', or an iterator of images."
            )
    if path.is_dir():
        return Feed(lambda: _iterate(_images_of(path)), clocked=False)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return Feed(lambda: _iterate([path]), clocked=False)
    return Feed(lambda: _read_opencv(name, realtime=realtime))


def _images_of(directory: Path) -> list[Path]:
    images = image_files(directory)
    if not images:
        raise CameraError("The directory holds no image (JPEG, PNG, WebP or BMP).")
    return images


def _iterate(images: Iterable[ImageLike]) -> Generator[ImageLike, None, None]:
    frames = iter(images)
    try:
        for frame in frames:
            # Camera code often fills one buffer again and again.
            yield frame.copy() if isinstance(frame, np.ndarray) else frame
    finally:
        close = getattr(frames, "close", None)
        if close is not None:
            close()


def _read_opencv(
    name: int | str, *, pipeline: bool = False, realtime: bool = False
) -> Generator[ImageLike, None, None]:
    """Yield RGB frames of what ``cv2.VideoCapture`` opens by index, path or pipeline."""
    try:
        import cv2
    except ImportError as exc:
        raise MissingDependencyError(
            'Cameras and video files need OpenCV: pip install "molmo-edge[camera]". An iterator of '
            "images needs nothing."
        ) from exc
    shown, is_file = f"camera {name}", False
    if pipeline:
        shown = "the GStreamer pipeline"
    elif isinstance(name, str):
        shown, is_file = f"'{name}'", Path(name).is_file()
        if not Path(name).exists():
            raise CameraError(f"There is no device, file or directory {shown}.")
    capture: Any = cv2.VideoCapture(name, cv2.CAP_GSTREAMER if pipeline else cv2.CAP_ANY)
    try:
        if not capture.isOpened():
            raise CameraError(
                f"OpenCV cannot open {shown}; is it there, and free? A pipeline needs an OpenCV "
                "with GStreamer, which the wheels on PyPI are not."
            )
        fps = capture.get(cv2.CAP_PROP_FPS) if is_file and realtime else 0.0
        due = time.monotonic()
        codes = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}
        while (read := capture.read())[0]:
            frame = read[1]
            yield cv2.cvtColor(frame, codes[1 if frame.ndim == 2 else frame.shape[2]])
            if 0 < fps < 1000:
                due = max(due + 1 / fps, time.monotonic())
                time.sleep(max(0.0, due - time.monotonic()))
        if not is_file:
            raise CameraError(f"OpenCV reads no more frames from {shown}.")
    finally:
        capture.release()
