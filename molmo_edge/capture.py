"""The thread behind `watch`: it reads a source, keeps the newest frame, and starts again if asked.

A consumer polls; only the thread here ever blocks on a camera. It knows nothing of questions.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from molmo_edge.cameras import Feed, Source, open_source
from molmo_edge.errors import CameraError, ConfigError, MolmoEdgeError
from molmo_edge.images import ImageLike

logger = logging.getLogger("molmo_edge")

# Longest wait for a thread in the middle of a read. One that has stalled is not waited for: its
# read cannot be interrupted, and it ends by itself when that returns.
_JOIN_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0


@dataclass(frozen=True)
class Watching:
    """How to watch, checked."""

    feed: Callable[[], Feed]
    keep_all: bool
    interval_s: float
    frame_timeout: float | None
    reconnect: bool

    @classmethod
    def checked(
        cls,
        source: Source,
        drop: str,
        max_fps: float | None,
        frame_timeout: float | None,
        on_stall: str,
    ) -> Self:
        """Raises ConfigError for what cannot be."""
        if drop not in ("oldest", "none"):
            raise ConfigError("drop must be 'oldest' or 'none'.")
        if on_stall not in ("raise", "reconnect"):
            raise ConfigError("on_stall must be 'raise' or 'reconnect'.")
        for name, value in (("max_fps", max_fps), ("frame_timeout", frame_timeout)):
            if value is not None and (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not (math.isfinite(value) and value > 0)
            ):
                raise ConfigError(f"{name} must be a positive number, or None.")
        feed = open_source(source)
        if on_stall == "reconnect" and not feed.reopens:
            raise ConfigError(
                "An iterator cannot be opened again; for on_stall='reconnect' give a function "
                "that returns one."
            )
        return cls(
            feed=lambda: open_source(source),
            keep_all=drop == "none" or not feed.clocked,
            interval_s=1.0 / max_fps if max_fps else 0.0,
            frame_timeout=frame_timeout,
            reconnect=on_stall == "reconnect",
        )


@dataclass(frozen=True)
class Frame:
    raw: Any
    picture: Callable[[Any], ImageLike]
    captured_s: float
    captured_at: float
    number: int
    dropped: int


class Capture:
    """The thread that opens, reads and closes one feed, and the one frame that waits."""

    def __init__(self, feed: Feed, keep_all: bool, notify: Callable[[], None]) -> None:
        self._feed = feed
        self._keep_all = keep_all
        self._notify = notify
        self._lock = threading.Condition(threading.Lock())
        self._frame: Frame | None = None
        self._dropped = 0
        self._stop = threading.Event()
        self.count = 0
        self.finished = False
        self.failure: MolmoEdgeError | None = None
        # When the source last gave, or was last asked for, a frame.
        self.since = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="molmo-edge-camera", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> bool:
        return self._frame is not None

    def take(self) -> Frame | None:
        with self._lock:
            frame, self._frame = self._frame, None
            if frame is not None:
                self._dropped = 0
                if self._keep_all:
                    self.since = time.monotonic()
                self._lock.notify_all()
            return frame

    def stop(self) -> None:
        with self._lock:
            self._stop.set()
            self._lock.notify_all()

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
        feed = self._feed
        due = time.monotonic()
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._stop.is_set() or not (self._keep_all and self.waiting)
                )
            if self._stop.is_set() or (raw := feed.read()) is None:
                return
            now = time.monotonic()
            with self._lock:
                if self._stop.is_set():
                    return
                self._dropped += self.waiting
                self._frame = Frame(
                    raw, feed.picture, now, time.time(), self.count, self._dropped
                )
                self.count += 1
                if not self._keep_all:
                    self.since = now
            self._notify()
            if feed.interval_s and not self._keep_all:
                due = max(due + feed.interval_s, now)
                self._stop.wait(due - time.monotonic())


class Camera:
    """The current capture, its deadlines, and its successors after a stall; never blocks."""

    def __init__(self, how: Watching, notify: Callable[[], None]) -> None:
        self._how = how
        self._notify = notify
        self._all: list[Capture] = []
        self._capture: Capture | None = None
        self._retry_at = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._ready_at = 0.0
        self._base = 0
        self.reconnects = 0

    def poll(self) -> Frame | None:
        """A frame that is due now, or None. Raises CameraError, and StopIteration at the end."""
        now = time.monotonic()
        if now < max(self._ready_at, self._retry_at):
            return None
        if self._capture is None:
            self._capture = Capture(self._how.feed(), self._how.keep_all, self._notify)
            self._all.append(self._capture)
        capture = self._capture
        # In this order: a frame that came before the end is still given.
        finished, stalled = capture.finished, self._left(now) <= 0
        if not stalled or finished or self._how.keep_all:
            frame = capture.take()
            if frame is not None:
                self._pause_s = _FIRST_PAUSE_S
                self._ready_at = now + self._how.interval_s
                return frame
        if finished and capture.failure is None:
            raise StopIteration
        if finished or stalled:
            capture.stop()
            self._all.remove(capture)
            self._failed(capture, now)
        return None

    def wait_s(self) -> float | None:
        """Seconds until something is due without a notice; None: only a notice helps."""
        now = time.monotonic()
        due = max(self._ready_at, self._retry_at) - now
        if due > 0:
            return due
        left = self._left(now)
        return None if math.isinf(left) else max(0.0, left)

    def place(self, frame: Frame) -> int:
        """The frame's number across reconnects."""
        return self._base + frame.number

    def stop(self) -> None:
        for capture in self._all:
            capture.stop()

    def join(self) -> None:
        for capture in self._all:
            capture.thread.join(_JOIN_S)

    def _left(self, now: float) -> float:
        if self._how.frame_timeout is None or self._capture is None:
            return math.inf
        return self._capture.since + self._how.frame_timeout - now

    def _failed(self, capture: Capture, now: float) -> None:
        error = capture.failure or CameraError(
            f"The source has given no frame for {self._how.frame_timeout:g} s. Check the camera, "
            "raise frame_timeout, or watch with on_stall='reconnect'."
        )
        if not self._how.reconnect or not isinstance(error, CameraError):
            raise error
        logger.warning("%s Opening it again in %.1f s.", error, self._pause_s)
        self._capture = None
        self._base += capture.count
        self.reconnects += 1
        self._retry_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
