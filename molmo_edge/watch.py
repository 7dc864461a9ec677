"""`watch`: answer the same question about the newest frame of a camera, again and again.

A thread of its own opens, reads and closes the source; the consumer never blocks on a camera.
Between the two are atomic operations and a plain lock alone, so Ctrl-C in the consumer leaves
nothing locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
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
from dataclasses import dataclass
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
from molmo_edge.images import ImageLike
from molmo_edge.results import Result

logger = logging.getLogger("molmo_edge")

Source: TypeAlias = int | str | Path | Iterable[ImageLike] | Callable[[], Iterable[ImageLike]]

# Failures that belong to one frame; the next one may be answered.
_FRAME_ERRORS = (ImageError, RequestError, QueueFull)
# Longest wait for a thread in the middle of a read. One that has stalled is not waited for: its
# read cannot be interrupted, and it ends by itself when that returns.
_JOIN_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
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
    answered_s: float
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
            if value is not None and (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not (math.isfinite(value) and value > 0)
            ):
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
    changed = threading.Lock()  # held while there is no news

    def notify() -> None:
        with contextlib.suppress(RuntimeError):  # there is news already
            changed.release()

    camera = _Camera(options, notify)
    try:
        while True:
            changed.acquire(blocking=False)
            frame = camera.poll()
            if camera.ended:
                return
            if frame is None:
                changed.acquire(timeout=camera.wait_s())
                continue
            image, result, error = frame.feed.image(frame.raw), None, None
            try:
                result = answer(image)
            except _FRAME_ERRORS as exc:
                error = exc
            yield camera.seen(frame, image, result, error)
    finally:
        camera.stop()
        camera.join()


async def arun(
    options: WatchOptions, answer: Callable[[ImageLike], Awaitable[Result]]
) -> AsyncGenerator[Seen, None]:
    """Do the same as `run` for asyncio; see `EdgeVLM.awatch`."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        with contextlib.suppress(RuntimeError):  # the event loop may have ended
            loop.call_soon_threadsafe(changed.set)

    camera = _Camera(options, notify)
    try:
        while True:
            changed.clear()
            frame = camera.poll()
            if camera.ended:
                return
            if frame is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), camera.wait_s())
                continue
            image, result, error = frame.feed.image(frame.raw), None, None
            try:
                result = await answer(image)
            except _FRAME_ERRORS as exc:
                error = exc
            yield camera.seen(frame, image, result, error)
    finally:
        camera.stop()
        await asyncio.to_thread(camera.join)


@dataclass(frozen=True)
class _Frame:
    raw: Any
    feed: Feed
    number: int
    captured_s: float
    captured_at: float


class _Capture:
    """The thread that opens, reads and closes one feed, and the one frame that waits."""

    def __init__(self, feed: Feed, keep_all: bool, notify: Callable[[], None]) -> None:
        self._feed = feed
        self._keep_all = keep_all
        self._notify = notify
        self._frames: deque[_Frame] = deque(maxlen=1)
        self._resume: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopped = False
        self.count = 0
        self.finished = False
        self.failure: MolmoEdgeError | None = None
        self.since = time.monotonic()  # when the source last gave a frame, or was asked for one
        self.thread = threading.Thread(target=self._run, name="molmo-edge-camera", daemon=True)
        self.thread.start()

    def take(self) -> _Frame | None:
        try:
            frame = self._frames.popleft()
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
            self._feed.open()
            self.since = time.monotonic()
            self._read()
        except MolmoEdgeError as exc:
            self.failure = exc
        except Exception as exc:
            self.failure = CameraError(
                f"The source failed: {type(exc).__name__}. The chained error says why."
            )
            self.failure.__cause__ = exc
        finally:
            try:
                self._feed.close()
            except Exception as exc:
                logger.warning("Closing the source failed: %s", type(exc).__name__)
            self.finished = True
            self._notify()

    def _read(self) -> None:
        due = time.monotonic()
        while not self._stopped and (raw := self._feed.read()) is not None:
            now = time.monotonic()
            if self._stopped:
                return
            if not self._keep_all:
                self.since = now
            self._frames.append(_Frame(raw, self._feed, self.count, now, time.time()))
            self.count += 1
            self._notify()
            if self._keep_all:
                self._resume.get()
            elif self._feed.interval_s:
                due = max(due + self._feed.interval_s, now)
                with contextlib.suppress(queue.Empty):
                    self._resume.get(timeout=max(0.0, due - time.monotonic()))


class _Camera:
    """The current capture, its deadlines, and its successors after a failure; never blocks."""

    def __init__(self, options: WatchOptions, notify: Callable[[], None]) -> None:
        self._options = options
        self._notify = notify
        self._interval_s = 1 / options.max_fps if options.max_fps else 0.0
        self._keep_all = options.drop == "none" or not open_source(options.source).clocked
        self._capture: _Capture | None = None
        self._due_s = 0.0  # no frame is due before
        self._pause_s = _FIRST_PAUSE_S
        self._first = 0  # number of this capture's first frame across reconnects
        self._next = 0
        self._reconnects = 0
        self.ended = False

    def poll(self) -> _Frame | None:
        """Return a frame that is due now. Sets `ended` at the end; raises CameraError."""
        now = time.monotonic()
        if now < self._due_s:
            return None
        if self._capture is None:
            feed = open_source(self._options.source)
            self._capture = _Capture(feed, self._keep_all, self._notify)
        capture = self._capture
        # In this order: a frame that came before the end is still given.
        finished, stalled = capture.finished, self._left_s(now) <= 0
        if not stalled or finished or self._keep_all:
            if (frame := capture.take()) is not None:
                self._pause_s = _FIRST_PAUSE_S
                self._due_s = now + self._interval_s
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

    def seen(
        self, frame: _Frame, image: ImageLike, result: Result | None, error: MolmoEdgeError | None
    ) -> Seen:
        index = self._first + frame.number
        dropped, self._next = index - self._next, index + 1
        return Seen(
            image=image,
            index=index,
            captured_s=frame.captured_s,
            captured_at=frame.captured_at,
            answered_s=time.monotonic(),
            dropped=dropped,
            reconnects=self._reconnects,
            result=result,
            error=error,
        )

    def stop(self) -> None:
        if self._capture is not None:
            self._capture.stop()

    def join(self) -> None:
        if self._capture is not None:
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


class Feed:
    """A source of frames: opened, read and closed once, in one thread of its own.

    Attributes:
        clocked: frames come by themselves and are lost when nobody reads them.
        reopens: it can be opened again after it failed.
        interval_s: pause between frames that gives a file its own speed; 0 for none.
    """

    clocked = True
    reopens = True
    interval_s = 0.0

    def open(self) -> None:
        """Raise CameraError when it is not there, MissingDependencyError without OpenCV."""
        raise NotImplementedError

    def read(self) -> Any:
        """Return the next frame as the source has it, None at the end. Raises CameraError."""
        raise NotImplementedError

    def image(self, frame: Any) -> ImageLike:
        """Convert a frame to what a query takes; called only for frames that are answered."""
        return frame  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give the device back; called once, also after a failed `open`."""


def open_source(source: Source) -> Feed:
    """Return the feed of a source, not opened yet; see `WatchOptions`. Raises ConfigError."""
    if isinstance(source, int) and not isinstance(source, bool) and source >= 0:
        return _OpenCVFeed(source)
    if isinstance(source, str | Path) and str(source).strip():
        return _open_name(source)
    if isinstance(source, list | tuple):
        return _IteratorFeed(lambda: iter(source), clocked=False)
    if isinstance(source, Iterator):
        return _IteratorFeed(lambda: source, reopens=False)
    if callable(source):
        return _IteratorFeed(lambda: iter(source()))
    if isinstance(source, Iterable) and not isinstance(source, _NO_FRAMES):
        return _IteratorFeed(lambda: iter(source))
    shown = f"a value of type {type(source).__name__}"
    if isinstance(source, int | str):
        shown = "an empty string" if isinstance(source, str) else f"{source}"
    raise ConfigError(
        "A source is a camera's index, a device, video file, directory or GStreamer pipeline by "
        f"name, or an iterator of images; not {shown}."
    )


def _open_name(source: str | Path) -> Feed:
    text, path = str(source), Path(source)
    if isinstance(source, str):
        if text.strip().isdecimal():
            return _OpenCVFeed(int(text))
        if "!" in text and not path.exists():
            return _OpenCVFeed(text, pipeline=True)
        if "://" in text:
            raise ConfigError(
                "A source is not a URL: nothing is fetched. Give a GStreamer pipeline, such as "
                "'rtspsrc location=… ! … ! appsink', or an iterator of images."
            )
    if path.is_dir():
        return _IteratorFeed(lambda: _directory(path), clocked=False)
    if path.suffix.lower() in _SUFFIXES and path.is_file():
        return _IteratorFeed(lambda: iter([path]), clocked=False)
    return _OpenCVFeed(text)


def _directory(path: Path) -> Iterator[Path]:
    images = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not images:
        raise CameraError("The directory holds no image (JPEG, PNG, WebP or BMP).")
    return iter(images)


class _IteratorFeed(Feed):
    """Images that Python code yields; `begin` gives a fresh iterator in the feed's thread."""

    def __init__(
        self,
        begin: Callable[[], Iterator[ImageLike]],
        *,
        clocked: bool = True,
        reopens: bool = True,
    ) -> None:
        self.clocked = clocked
        self.reopens = reopens
        self._begin = begin
        self._frames: Iterator[ImageLike] = iter(())

    def open(self) -> None:
        self._frames = self._begin()

    def read(self) -> Any:
        for frame in self._frames:
            if frame is None:
                raise CameraError("The source yielded None instead of an image.")
            # Camera code often fills one buffer again and again.
            return frame.copy() if self.clocked and isinstance(frame, np.ndarray) else frame
        return None

    def close(self) -> None:
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()


class _OpenCVFeed(Feed):
    """Whatever ``cv2.VideoCapture`` opens by index, path or pipeline."""

    def __init__(self, name: int | str, *, pipeline: bool = False) -> None:
        self._name = name
        self._pipeline = pipeline
        self._is_file = False
        self._capture: Any = None
        self._shown = f"camera {name}" if isinstance(name, int) else f"'{name}'"
        if pipeline:
            self._shown = "the GStreamer pipeline"

    def open(self) -> None:
        try:
            import cv2
        except ImportError as exc:
            raise MissingDependencyError(
                'Cameras and video files need OpenCV: pip install "molmo-edge[camera]". An '
                "iterator of images needs nothing."
            ) from exc
        arguments = [self._name]
        if self._pipeline:
            information = cv2.getBuildInformation().splitlines()
            if not any("GStreamer:" in line and "YES" in line for line in information):
                raise CameraError(
                    "This OpenCV was built without GStreamer. Use one that has it (a Jetson's "
                    "own, or a build from source), or an iterator of images."
                )
            arguments.append(cv2.CAP_GSTREAMER)
        elif isinstance(self._name, str):
            try:
                self._is_file = stat.S_ISREG(Path(self._name).stat().st_mode)
            except OSError as exc:
                raise CameraError(f"There is no device, file or directory {self._shown}.") from exc
        self._capture = cv2.VideoCapture(*arguments)
        if not self._capture.isOpened():
            raise CameraError(f"OpenCV cannot open {self._shown}; is it there, and free?")
        if self._is_file:
            fps = self._capture.get(cv2.CAP_PROP_FPS)
            self.interval_s = 1.0 / fps if 0 < fps < 1000 else 0.0

    def read(self) -> Any:
        success, frame = self._capture.read()
        if success and frame is not None:
            return frame
        if self._is_file:
            return None
        raise CameraError(f"{self._shown} delivers no more frames.")

    def image(self, frame: Any) -> ImageLike:
        """Convert to an H x W x 3 uint8 RGB array; OpenCV's order is BGR."""
        if frame.ndim == 2:
            frame = np.repeat(frame[..., None], 3, axis=2)
        return np.ascontiguousarray(frame[..., 2::-1])

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
