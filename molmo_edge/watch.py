"""`watch`: the newest frame of a source, asked about again and again.

Joins a camera (`capture`) and a function that asks; it knows nothing of prompts and engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from dataclasses import dataclass

from molmo_edge.capture import Camera, Frame, Watching
from molmo_edge.errors import ImageError, MolmoEdgeError, QueueFull, RequestError
from molmo_edge.images import ImageLike
from molmo_edge.results import Result

# Failures that belong to one frame; the next one may be answered.
_OF_ONE_FRAME = (ImageError, RequestError, QueueFull)


@dataclass(frozen=True, eq=False)
class Seen:
    """One frame and what was said about it.

    Attributes:
        image: the frame; an H x W x 3 uint8 RGB array from OpenCV, else what the source yielded.
        index: its number in the source, from 0, dropped frames counted, across reconnects.
        captured_s: when it was read, on the monotonic clock of `time.monotonic`.
        captured_at: the same in seconds since 1970.
        answered_s: when the answer was there, monotonic.
        dropped: frames that came and went unasked since the frame before.
        reconnects: how often the source was opened again so far.
        result: the answer; None when there is an `error`.
        error: why this frame has no answer: its deadline passed, the picture cannot be used, …
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


def run(how: Watching, ask: Callable[[ImageLike], Result]) -> Generator[Seen, None, None]:
    """See `EdgeVLM.watch`."""
    changed = threading.Event()
    camera = Camera(how, changed.set)
    try:
        while True:
            changed.clear()
            try:
                frame = camera.poll()
            except StopIteration:
                return
            if frame is None:
                changed.wait(camera.wait_s())
                continue
            image = frame.picture(frame.raw)
            try:
                outcome: Result | MolmoEdgeError = ask(image)
            except _OF_ONE_FRAME as exc:
                outcome = exc
            yield _seen(camera, frame, image, outcome)
    finally:
        camera.stop()
        camera.join()


async def arun(
    how: Watching, ask: Callable[[ImageLike], Awaitable[Result]]
) -> AsyncGenerator[Seen, None]:
    """See `EdgeVLM.awatch`."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def notify() -> None:
        # The event loop may be gone while the camera still delivers.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(changed.set)

    camera = Camera(how, notify)
    try:
        while True:
            changed.clear()
            try:
                frame = camera.poll()
            except StopIteration:
                return
            if frame is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), camera.wait_s())
                continue
            image = frame.picture(frame.raw)
            try:
                outcome: Result | MolmoEdgeError = await ask(image)
            except _OF_ONE_FRAME as exc:
                outcome = exc
            yield _seen(camera, frame, image, outcome)
    finally:
        camera.stop()
        await asyncio.to_thread(camera.join)


def _seen(
    camera: Camera, frame: Frame, image: ImageLike, outcome: Result | MolmoEdgeError
) -> Seen:
    failed = isinstance(outcome, MolmoEdgeError)
    return Seen(
        image=image,
        index=camera.place(frame),
        captured_s=frame.captured_s,
        captured_at=frame.captured_at,
        answered_s=time.monotonic(),
        dropped=frame.dropped,
        reconnects=camera.reconnects,
        result=None if failed else outcome,  # type: ignore[arg-type]
        error=outcome if failed else None,  # type: ignore[arg-type]
    )
