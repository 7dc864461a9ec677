"""What the node does, without ROS: the newest image, questions about it, and their state."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo_edge import EdgeVLM, PointResult, Result
from molmo_edge.errors import MolmoEdgeError

# Bytes of a pixel, and where red, green and blue are in it.
_ENCODINGS: Mapping[str, tuple[int, list[int]]] = {
    "rgb8": (3, [0, 1, 2]),
    "bgr8": (3, [2, 1, 0]),
    "rgba8": (4, [0, 1, 2]),
    "bgra8": (4, [2, 1, 0]),
    "mono8": (1, [0, 0, 0]),
}


@dataclass(frozen=True)
class Frame:
    """An image: height x width x 3 uint8 RGB, and the header that its answers get."""

    image: npt.NDArray[np.uint8]
    header: Any


@dataclass(frozen=True)
class Answer:
    """An answer about a frame; one of `result`, `points` and `error` is given."""

    frame: Frame
    result: Result | None = None
    points: PointResult | None = None
    error: MolmoEdgeError | None = None

    def pixels(self) -> list[tuple[int, int]]:
        """(column, row) of each point."""
        height, width = self.frame.image.shape[:2]
        return [one.px((width, height)) for one in self.points.points] if self.points else []


def rgb(encoding: str, height: int, width: int, step: int, data: bytes) -> npt.NDArray[np.uint8]:
    """Return the pixels of a ``sensor_msgs/Image``, whose rows are padded to `step` bytes.

    Raises ValueError for another encoding or too few bytes.
    """
    if encoding not in _ENCODINGS:
        raise ValueError(f"cannot read {encoding}; use one of {', '.join(_ENCODINGS)}")
    size, order = _ENCODINGS[encoding]
    if step < size * width or len(data) < height * step:
        raise ValueError(
            f"{height} rows of {step} bytes do not hold {width} pixels of {encoding} each, or "
            f"there are fewer bytes: {len(data)}"
        )
    rows = np.frombuffer(data, np.uint8, height * step).reshape(height, step)
    pixels = rows[:, : size * width].reshape(height, width, size)
    return np.ascontiguousarray(pixels[..., order])


@dataclass
class Looker:
    """Asks about the newest of the frames that are offered, in a thread of its own.

    Attributes:
        vlm: stays open.
        question, label: what to ask, or with a label what to point to; neither asks nothing.
        answered: called in that thread with every answer.
        options: of each request.
        dropped: frames that a newer one replaced before they were asked about.
        latency_s: seconds of the last answer.
        error: of the last one that failed or could not be handed on, None after one that was.
    """

    vlm: EdgeVLM
    question: str
    label: str
    answered: Callable[[Answer], None]
    options: Mapping[str, Any] = field(default_factory=dict)
    dropped: int = 0
    answers: int = 0
    latency_s: float | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: Frame | None = None
        self._last: Frame | None = None
        self._stopped = False
        self._model = str(self.vlm.environment.get("model"))  # which a dead engine does not say
        self._thread = threading.Thread(target=self._run, name="molmo-edge-looker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, frame: Frame) -> None:
        """Take a frame; from any thread, at once."""
        with self._changed:
            self._last = frame
            if self.question or self.label:
                self.dropped += self._waiting is not None
                self._waiting = frame
                self._changed.notify()

    def stop(self) -> None:
        """End the thread after the answer that it waits for."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def ask(
        self, question: str, feedback: Callable[[str], None], cancelled: Callable[[], bool]
    ) -> Result | None:
        """Answer one question about the newest frame; None when it was cancelled.

        Args:
            feedback: called with the text so far.
            cancelled: asked after each piece of it.

        Raises:
            ValueError: there was no frame yet.
            As `EdgeVLM.query`.
        """
        if (frame := self._last) is None:
            raise ValueError("no image has arrived yet")
        with self.vlm.stream(frame.image, question, **self.options) as stream:
            for _ in stream:
                if cancelled():
                    return None
                feedback(stream.text)
            return stream.result()

    def diagnostics(self) -> dict[str, str]:
        """State by name, for ``diagnostic_msgs``."""
        latency = "unknown" if self.latency_s is None else f"{self.latency_s:.3f}"
        return {
            "state": str(self.vlm.state),
            "model": self._model,
            "answers": str(self.answers),
            "dropped frames": str(self.dropped),
            "seconds of the last answer": latency,
            "error": self.error or "",
        }

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._waiting is not None)
                frame, self._waiting = self._waiting, None
            if self._stopped or frame is None:
                return
            began = time.monotonic()
            try:
                if self.label:
                    points = self.vlm.point(frame.image, self.label, **self.options)
                    answer = Answer(frame, points=points)
                else:
                    result = self.vlm.query(frame.image, self.question, **self.options)
                    answer = Answer(frame, result)
            except MolmoEdgeError as exc:
                answer = Answer(frame, error=exc)
            self.latency_s = time.monotonic() - began
            self.error = None if answer.error is None else str(answer.error)
            self.answers += answer.error is None
            try:
                self.answered(answer)
            except Exception as exc:  # such as a publisher that is gone; the next image is asked
                self.error = f"{type(exc).__name__}: {exc}"
