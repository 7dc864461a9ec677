"""Where `watch` gets its frames: OpenCV devices, files and pipelines, folders, iterators.

A feed is opened, read and closed in one thread of its own. It knows nothing of models, nor of
which frames are dropped.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from molmo_edge.errors import CameraError, ConfigError, MissingDependencyError
from molmo_edge.images import ImageLike

Source: TypeAlias = (
    int | str | Path | Iterable[ImageLike] | Callable[[], Iterable[ImageLike]]
)

_PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_NONE = object()
# One picture or its bytes; iterating over it would give rows or numbers.
_NO_FRAMES = (str, bytes, bytearray, memoryview, Mapping, np.ndarray)


class Feed(Protocol):
    """A source of frames.

    Attributes:
        clocked: frames come by themselves and are lost when nobody reads them.
        reopens: it can be opened again after it failed.
        interval_s: pause between frames that gives a file its own speed; 0 for none.
    """

    clocked: bool
    reopens: bool
    interval_s: float

    def open(self) -> None:
        """Raises CameraError when it is not there, MissingDependencyError without OpenCV."""
        ...

    def read(self) -> Any:
        """The next frame as the source has it, `None` at the end. Raises CameraError."""
        ...

    def picture(self, frame: Any) -> ImageLike:
        """A frame as a query takes it; called only for frames that are asked about."""
        ...

    def close(self) -> None:
        """Gives the device back; called once, also after a failed `open`."""
        ...


def open_source(source: Source) -> Feed:
    """The feed of a source, not opened yet.

    Args:
        source: one of

            - a whole number, or a text of digits: an OpenCV device by index;
            - a text with ``!`` in it: a GStreamer pipeline that ends in ``appsink``, for an OpenCV
              with GStreamer (the wheels on PyPI have none, a Jetson's own build has);
            - the path of a device such as ``/dev/video0``, or of a video file, played at its own
              speed;
            - a folder: its pictures in the order of their names. It has no clock, so none of them
              is dropped. The same holds for a list or tuple of pictures;
            - an iterator of pictures (arrays are RGB, as everywhere), or a function that returns
              one, which can be called again to reconnect.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(source, int) and not isinstance(source, bool) and source >= 0:
        return OpenCVFeed(source)
    if isinstance(source, str | Path) and str(source).strip():
        return _named(source)
    if isinstance(source, list | tuple):
        return IteratorFeed(lambda: iter(source), clocked=False)
    if isinstance(source, Iterator):
        return IteratorFeed(lambda: source, reopens=False)
    if callable(source):
        return IteratorFeed(lambda: iter(source()))
    if isinstance(source, Iterable) and not isinstance(source, _NO_FRAMES):
        return IteratorFeed(lambda: iter(source))
    raise ConfigError(
        "A source is a camera's index, a device, video file, folder or GStreamer pipeline by name, "
        f"or an iterator of pictures; not {_kind(source)}."
    )


def _kind(source: object) -> str:
    if isinstance(source, int | str):
        return "an empty text" if isinstance(source, str) else f"{source}"
    return f"a value of type {type(source).__name__}"


def _named(source: str | Path) -> Feed:
    text = str(source)
    if isinstance(source, str):
        if text.strip().isdecimal():
            return OpenCVFeed(int(text))
        if "!" in text and not Path(text).exists():
            return OpenCVFeed(text, pipeline=True)
        if "://" in text:
            raise ConfigError(
                "A source is no URL: nothing is fetched. Give a GStreamer pipeline, such as "
                "'rtspsrc location=… ! … ! appsink', or an iterator of pictures."
            )
    path = Path(source)
    if path.is_dir():
        return IteratorFeed(lambda: _folder(path), clocked=False)
    if path.suffix.lower() in _PICTURES and path.is_file():
        return IteratorFeed(lambda: iter([path]), clocked=False)
    return OpenCVFeed(text)


def _folder(path: Path) -> Iterator[Path]:
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in _PICTURES and p.is_file())
    if not found:
        raise CameraError("The folder holds no picture (JPEG, PNG, WebP or BMP).")
    return iter(found)


class IteratorFeed:
    """Pictures that Python code yields.

    Args:
        begin: gives a fresh iterator; called in the feed's thread.
    """

    interval_s = 0.0

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
        self._frames: Iterator[ImageLike] | None = None

    def open(self) -> None:
        self._frames = self._begin()

    def read(self) -> Any:
        assert self._frames is not None
        frame: Any = next(self._frames, _NONE)
        if frame is _NONE:
            return None
        if frame is None:
            raise CameraError("The source yielded None instead of a picture.")
        # Camera code often fills one buffer again and again.
        return frame.copy() if self.clocked and isinstance(frame, np.ndarray) else frame

    def picture(self, frame: Any) -> ImageLike:
        return frame  # type: ignore[no-any-return]

    def close(self) -> None:
        frames, self._frames = self._frames, None
        close = getattr(frames, "close", None)
        if close is not None:
            close()


class OpenCVFeed:
    """Whatever ``cv2.VideoCapture`` opens; frames are H x W x 3 uint8 RGB arrays.

    Args:
        name: index, path or pipeline.
        pipeline: it is a GStreamer pipeline.
    """

    reopens = True

    def __init__(self, name: int | str, *, pipeline: bool = False) -> None:
        self._name = name
        self._pipeline = pipeline
        self._file = False
        self._capture: Any = None
        self.clocked = True
        self.interval_s = 0.0

    def open(self) -> None:
        cv2 = _cv2()
        if self._pipeline:
            _check_gstreamer(cv2)
            self._capture = cv2.VideoCapture(self._name, cv2.CAP_GSTREAMER)
        elif isinstance(self._name, str):
            self._file = _is_file(self._name)
            self._capture = cv2.VideoCapture(self._name)
        else:
            self._capture = cv2.VideoCapture(self._name)
        if not self._capture.isOpened():
            raise CameraError(f"OpenCV cannot open {self._shown()}; is it there, and free?")
        if self._file:
            fps = self._capture.get(cv2.CAP_PROP_FPS)
            self.interval_s = 1.0 / fps if 0 < fps < 1000 else 0.0

    def read(self) -> Any:
        good, frame = self._capture.read()
        if good and frame is not None:
            return frame
        if self._file:
            return None
        raise CameraError(f"{self._shown()} delivers no more frames.")

    def picture(self, frame: Any) -> ImageLike:
        if frame.ndim == 2:
            frame = np.repeat(frame[..., None], 3, axis=2)
        return np.ascontiguousarray(frame[..., 2::-1])  # OpenCV's order is BGR

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()

    def _shown(self) -> str:
        if self._pipeline:
            return "the GStreamer pipeline"
        return f"camera {self._name}" if isinstance(self._name, int) else f"'{self._name}'"


def _is_file(name: str) -> bool:
    """Whether it is a file rather than a device. Raises CameraError when it is not there."""
    try:
        return stat.S_ISREG(Path(name).stat().st_mode)
    except OSError as exc:
        raise CameraError(f"There is no device, file or folder '{name}'.") from exc


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as exc:
        raise MissingDependencyError(
            'Cameras and video files need OpenCV: pip install "molmo-edge[camera]". An iterator '
            "of pictures needs nothing."
        ) from exc
    return cv2


def _check_gstreamer(cv2: Any) -> None:
    lines = [line for line in cv2.getBuildInformation().splitlines() if "GStreamer:" in line]
    if not any("YES" in line for line in lines):
        raise CameraError(
            "This OpenCV was built without GStreamer. Use one that has it (a Jetson's own, or a "
            "build from source), or an iterator of pictures."
        )
