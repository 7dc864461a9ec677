"""Load any supported video as sampled, upright 8-bit RGB frames with their times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from molmo_edge import images
from molmo_edge.errors import ConfigError, ImageError, VideoError
from molmo_edge.images import ImageLike

Frame: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Video:
    """Frames of a video, where a file is not what the caller has. Exactly one of the two is given:

    Attributes:
        frames: uint8 array of shape (n, height, width, 3) in RGB order, or a sequence of whatever
            ``images.load`` takes; sizes may differ.
        timestamps: seconds of each frame, strictly increasing, not negative. The frames are used
            as they are.
        fps: frames per second; the frames are sampled by index.
    """

    frames: Sequence[ImageLike] | Frame
    timestamps: Sequence[float] | None = None
    fps: float | None = None


VideoLike: TypeAlias = str | Path | bytes | bytearray | memoryview | Video


@dataclass(frozen=True)
class VideoLimits:
    """Caps on untrusted videos, and how many frames are sampled.

    Attributes:
        max_bytes: of the encoded file.
        max_pixels: width x height of a frame.
        max_duration_s: of a file, by its frames' time stamps.
        max_frames: sampled frames.
        max_fps: sampled frames per second.
        max_frame_bytes: of all sampled frames as RGB; 4 GiB hold 384 frames of 2560 x 1440 pixels.

    Raises:
        ConfigError: a cap is not positive, or not an integer where one is expected.
    """

    max_bytes: int = 4 * 2**30
    max_pixels: int = 36_000_000
    max_duration_s: float = 4 * 3600.0
    max_frames: int = 384
    max_fps: float = 2.0
    max_frame_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind = (int, float) if name in ("max_duration_s", "max_fps") else (int,)
            if type(value) not in kind or not (value > 0 and math.isfinite(value)):
                raise ConfigError(
                    f"VideoLimits.{name} must be a positive {kind[-1].__name__}, not infinite"
                )


@dataclass(frozen=True)
class Clip:
    """Sampled frames of a video.

    Attributes:
        frames: uint8 arrays of shape (height, width, 3), RGB, upright.
        times: seconds from the video's first frame, one per frame, not decreasing. Of a file: the
            requested times, so the last one is the duration. Of ``Video(fps=…)``: index / fps.
        size: (width, height) of the first frame, to which points in answers refer.
        fps: mean frame rate of the source; None where it has only one frame.
        skipped: broken frames of the file that were left out.
    """

    frames: tuple[Frame, ...]
    times: tuple[float, ...]
    size: tuple[int, int]
    fps: float | None
    skipped: int = 0


def sample_indices(total: int, fps: float, max_frames: int, max_fps: float) -> list[int]:
    """Frames of an array of `total` frames that the model sees, as AllenAI's code chooses them.

    At most `max_frames`, first and last always among them; an index can repeat where `max_fps`
    is above `fps`.
    """
    if total <= 2:
        return list(range(total))
    if total / fps > (max_frames - 1) / max_fps:
        return [int(i) for i in np.linspace(0, total - 1, min(max_frames, total))]
    indices = np.arange(0, total - 1, fps / max_fps)
    if round(indices[-1]) != total - 1:
        indices = np.append(indices, total - 1)
    return [round(i) for i in indices.tolist()][:max_frames]


def sample_times(duration_s: float, max_frames: int, max_fps: float) -> list[float]:
    """Seconds at which a file of `duration_s` is sampled, as AllenAI's code chooses them.

    At most `max_frames`; the last one is the duration, at which the last frame is still shown.
    """
    if duration_s > (max_frames - 1) / max_fps:
        return [float(t) for t in np.linspace(0, duration_s, max_frames)]
    times = np.arange(0, duration_s, 1 / max_fps)[: max_frames - 1]
    return [*times.tolist(), float(duration_s)]


def load_video(source: VideoLike, limits: VideoLimits) -> Clip:
    """Return the sampled frames of `source`.

    Raises:
        VideoError: the video cannot be used; where something else failed, it is the cause.
        MissingDependencyError: no package that decodes video files is installed.
    """
    if isinstance(source, Video):
        return _from_frames(source, limits)
    raise VideoError("video files cannot be decoded yet")


def _from_frames(video: Video, limits: VideoLimits) -> Clip:
    frames, timestamps, fps = video.frames, video.timestamps, video.fps
    if (timestamps is None) == (fps is None):
        raise VideoError("a Video of frames needs either timestamps or fps, not both")
    if isinstance(frames, np.ndarray) and (
        frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3
    ):
        raise VideoError(
            "expected a uint8 array of shape (frames, height, width, 3) in RGB order, got "
            f"{frames.dtype.name} of shape {frames.shape}"
        )
    if not isinstance(frames, (Sequence, np.ndarray)) or isinstance(frames, (str, bytes)):
        raise VideoError(
            "Video.frames must be a sequence of images or a uint8 array of shape (frames, height, "
            f"width, 3), not {type(frames).__name__}"
        )
    total = len(frames)
    if total == 0:
        raise VideoError("the video has no frames")
    if timestamps is not None:
        times = _check_timestamps(timestamps, total)
        if total > limits.max_frames:
            raise VideoError(
                f"the video has {total} frames with timestamps, the limit is {limits.max_frames}; "
                "pass fewer, or pass fps instead so that they are sampled"
            )
        indices = list(range(total))
        fps = (total - 1) / (times[-1] - times[0]) if total > 1 else None
    else:
        if not isinstance(fps, (int, float)) or not (math.isfinite(fps) and fps > 0):
            raise VideoError("Video.fps must be a positive number of frames per second")
        indices = sample_indices(total, fps, limits.max_frames, limits.max_fps)
        times = [index / fps for index in indices]
    cap = images.ImageLimits(max_pixels=limits.max_pixels)
    arrays: dict[int, Frame] = {}
    kept = 0
    for index in indices:
        if index in arrays:
            continue
        try:
            arrays[index] = np.asarray(images.load(frames[index], cap))
        except ImageError as exc:
            raise VideoError(f"frame {index} of the video cannot be used: {exc}") from exc
        kept += arrays[index].nbytes
        _check_kept(kept, limits)
    return _clip([arrays[index] for index in indices], times, fps)


def _check_timestamps(timestamps: Sequence[float], total: int) -> list[float]:
    try:
        times = np.asarray(timestamps, np.float64)
    except (TypeError, ValueError) as exc:
        raise VideoError("Video.timestamps must be numbers: seconds, one per frame") from exc
    if times.shape != (total,):
        raise VideoError(f"expected {total} timestamps, one per frame, got shape {times.shape}")
    if not (np.isfinite(times).all() and times[0] >= 0 and (np.diff(times) > 0).all()):
        raise VideoError("Video.timestamps must be finite, not negative and strictly increasing")
    return [float(t) for t in times]


def _check_kept(kept: int, limits: VideoLimits) -> None:
    if kept > limits.max_frame_bytes:
        raise VideoError(
            f"the sampled frames take more than {limits.max_frame_bytes} bytes as RGB, the limit; "
            "send a video of lower resolution, allow fewer frames or raise "
            "VideoLimits.max_frame_bytes"
        )


def _clip(frames: list[Frame], times: list[float], fps: float | None, skipped: int = 0) -> Clip:
    height, width = frames[0].shape[:2]
    return Clip(tuple(frames), tuple(times), (width, height), fps, skipped)
