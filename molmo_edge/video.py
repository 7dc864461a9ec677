"""Load any supported video as sampled, upright 8-bit RGB frames with their times; write MP4 files.

Videos are untrusted: bytes, pixels, duration and decoding work are capped before anything is
decoded, only the sampled frames are kept, and nothing is ever fetched. Only MP4, MOV, Matroska,
WebM, AVI, MPEG-TS and GIF files are read, told by their content, so that no playlist or other file
that refers to further files is followed. PyAV decodes and encodes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from molmo_edge import images
from molmo_edge.errors import ImageError, MissingDependencyError, VideoError
from molmo_edge.files import expand_home, replacing
from molmo_edge.images import EncodedBytes, ImageLike

Frame: TypeAlias = npt.NDArray[np.uint8]

# Where a file holds which bytes, and FFmpeg's demuxer.
_CONTAINERS: Final = (
    (4, (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"), "mov"),
    (0, (b"\x1a\x45\xdf\xa3",), "matroska"),
    (8, (b"AVI ",), "avi"),
    (188, (b"G",), "mpegts"),
    (0, (b"GIF8",), "gif"),
)
_DECODERS: Final = (
    *("h264", "hevc", "vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "mpeg4"),
    *("mjpeg", "mpeg1video", "mpeg2video", "prores", "ffv1", "rawvideo", "gif"),
)
# Small files can ask for much work: bounds that fit an hour at 120 frames per second, and two hours
# of 1080p at 30, even if every frame has to be decoded.
_MAX_FILE_FRAMES: Final = 500_000
_MAX_DECODED_PIXELS: Final = 2**39
_MAX_FAILURES: Final = 100  # in a row


@dataclass(frozen=True)
class Video:
    """A video given as frames, with either their `timestamps` or their `fps`.

    Attributes:
        frames: uint8 array of shape (n, height, width, 3) in RGB order, or a sequence of whatever
            ``images.load`` takes; sizes may differ.
        timestamps: seconds, one per frame, strictly increasing, not negative. Every frame is used.
        fps: frames per second; the frames are sampled (`sample_indices`).
        skip_broken: leave out images that cannot be used, but not the last.
    """

    frames: Sequence[ImageLike] | Frame
    timestamps: Sequence[float] | None = None
    fps: float | None = None
    skip_broken: bool = False


VideoLike: TypeAlias = str | Path | EncodedBytes | npt.NDArray[np.uint8] | Video


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
        max_image_bytes: of each frame of a `Video` that is an encoded image.
    """

    max_bytes: int = 4 * 2**30
    max_pixels: int = 36_000_000
    max_duration_s: float = 4 * 3600.0
    max_frames: int = 384
    max_fps: float = 2.0
    max_frame_bytes: int = 4 * 2**30
    max_image_bytes: int = images.ImageLimits.max_bytes


@dataclass(frozen=True)
class Clip:
    """Sampled frames of a video.

    Attributes:
        frames: uint8 arrays of shape (height, width, 3), RGB, upright.
        times: seconds from the video's first frame, one per frame, not decreasing. Of a file: the
            requested times, so the last one is the duration. Of ``Video(fps=…)``: index / fps.
    """

    frames: tuple[Frame, ...]
    times: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the first frame, to which points in answers refer."""
        height, width = self.frames[0].shape[:2]
        return width, height


def sample_indices(total: int, fps: float, max_frames: int, max_fps: float) -> list[int]:
    """Frames of an array of `total` frames that the model sees, as AllenAI's code chooses them.

    At most `max_frames`, first and last always among them; an index can repeat where `max_fps`
    is above `fps`.
    """
    if total <= 2:
        return list(range(min(total, max_frames)))
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

    Args:
        source: the path of a video file, the bytes of one in any form that ``images.load`` takes,
            or a `Video`. A file is sampled by time (`sample_times`): each time gets the frame shown
            then, by the frames' own time stamps. Rotation metadata is applied. A broken frame is
            replaced by the one before it.
        limits: caps, and how many frames are sampled.

    Raises:
        VideoError: the video cannot be used; where something else failed, it is the cause.
        MissingDependencyError: a file, and PyAV is not installed.
    """
    if isinstance(source, Video):
        return _from_frames(source, limits)
    with _opened(source, limits) as (av, file, container):
        return _decode(av, file, container, limits)


def frame_times(path: Path, fps: float, limits: VideoLimits) -> Iterator[float]:
    """Seconds, from the first frame on, at which `read_frames` reads a file. Raises as it does."""
    with _opened(path, limits) as (av, file, container):
        index = _read_index(av, file, container, limits)
    yield from _frame_times(index, fps)


def read_frames(
    path: Path, fps: float, limits: VideoLimits
) -> Generator[tuple[float, Frame], None, None]:
    """Decode a video file from its start; yield (seconds, the frame that is shown then).

    However long the video, one frame is held in memory. One that is broken is replaced by the one
    before it.

    Args:
        fps: how many to yield for each second.

    Raises:
        VideoError, MissingDependencyError: as `load_video`.
    """
    with _opened(path, limits) as (av, file, container):
        index = _read_index(av, file, container, limits)
        begin = float(index.ticks[index.order[0]] * index.tick)
        newest: Any = None
        times = _frame_times(index, fps)
        time = next(times, None)
        with closing(_packets(av, file, container, limits)) as packets:
            for stamp, frame in _frames(av, packets):
                start = float(stamp * index.tick) - begin
                # A microsecond inside the frame: the sum may fall on either side of its start.
                while newest is not None and time is not None and time + 1e-6 < start:
                    yield time, _upright(newest, limits)
                    time = next(times, None)
                newest = frame
        if newest is None:
            raise VideoError("no frame of the video can be decoded")
        while time is not None:
            yield time, _upright(newest, limits)
            time = next(times, None)


def _frame_times(index: _Index, fps: float) -> Iterator[float]:
    duration_s = float((index.end - int(index.ticks[index.order[0]])) * index.tick)
    return (i / fps for i in range(max(1, math.ceil(duration_s * fps - 1e-6))))


def _frames(av: Any, packets: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    """All frames that can be decoded, in the order in which they are shown, and their time stamps.

    In ticks: the frames that a decoder holds back to the end do not know their length.
    """
    codec: Any = None
    failures = 0
    for packet in chain(packets, (None,)):
        codec = codec if packet is None else packet.stream.codec_context
        try:
            frames = [] if codec is None else codec.decode(packet)
            failures = 0
        except av.FFmpegError as exc:
            frames, failures = [], failures + 1
            _give_up(failures, exc)
        for frame in frames:
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is not None and not frame.is_corrupt:
                yield stamp, frame


def _give_up(failures: int, exc: Exception) -> None:
    """Raise VideoError after too many failures in a row."""
    if failures == _MAX_FAILURES:
        raise VideoError(
            f"{failures} frames in a row cannot be decoded; the file is damaged"
        ) from exc


@contextmanager
def _opened(source: VideoLike, limits: VideoLimits) -> Iterator[tuple[Any, BinaryIO, str]]:
    """PyAV, the file and its container."""
    decoded = "molmo_edge.Video(frames, fps=…)"
    with (
        images.named(source),
        _translated("read the video file"),
        images.open_file(source, "a video", decoded, VideoError) as file,
    ):
        images.check_bytes(file, "video", limits.max_bytes, VideoError)
        container = _container(file.read(1024))
        yield _pyav(), file, container


def _read_index(av: Any, file: BinaryIO, container: str, limits: VideoLimits) -> _Index:
    with closing(_packets(av, file, container, limits)) as packets:
        return _index(packets, limits)


def _upright(frame: Any, limits: VideoLimits) -> Frame:
    _check_size(frame.width, frame.height, 1, limits)
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    return np.ascontiguousarray(pixels)


def write_video(path: str | Path, frames: Iterable[Frame], fps: float) -> None:
    """Write an MP4 file: H.264 where PyAV has an encoder for it, else MPEG-4.

    Args:
        path: of the file; written beside it and renamed when complete.
        frames: uint8, shape (height, width, 3), RGB, all of one size. An odd last row or column
            is repeated, as the encoders need even sizes.
        fps: frames per second.

    Raises:
        VideoError: no frames, or the file cannot be written.
        MissingDependencyError: PyAV is not installed.
    """
    av = _pyav()
    h264 = "libx264" in av.codecs_available
    with (
        _translated("write the video file"),
        replacing(expand_home(path)) as temporary,
        av.open(str(temporary), "w", format="mp4") as container,
    ):
        stream: Any = None
        for frame in frames:
            height, width = frame.shape[:2]
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if stream is None:
                stream = container.add_stream(
                    "libx264" if h264 else "mpeg4",
                    rate=Fraction(fps).limit_denominator(1001),
                    options={"crf": "18", "preset": "veryfast"} if h264 else {"qmax": "5"},
                )
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if stream is None:
            raise VideoError("the video has no frames")
        container.mux(stream.encode())


def _pyav() -> Any:
    try:
        import av
    except ImportError as exc:
        raise MissingDependencyError(
            'Video files need PyAV: pip install "molmo-edge[video]". A Video of frames does not.'
        ) from exc
    return av


@contextmanager
def _translated(action: str) -> Iterator[None]:
    """Translate third-party errors: PyAV spreads FFmpeg's over a dozen built-in classes."""
    try:
        yield
    except (VideoError, MissingDependencyError):
        raise
    except Exception as exc:
        damaged = "" if isinstance(exc, OSError) else ", which may be damaged or cut short"
        raise VideoError(
            f"could not {action}{damaged} ({type(exc).__name__}); the cause is chained to this "
            "error"
        ) from exc


def _from_frames(video: Video, limits: VideoLimits) -> Clip:
    frames, timestamps, fps = video.frames, video.timestamps, video.fps
    if (timestamps is None) == (fps is None):
        raise VideoError("a Video of frames needs either timestamps or fps, not both")
    if isinstance(frames, np.ndarray):
        usable = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3
    else:
        usable = isinstance(frames, Sequence) and not isinstance(frames, (str, bytes, bytearray))
    if not usable:
        raise VideoError(
            "Video.frames must be a sequence of images or a uint8 array of shape (frames, height, "
            "width, 3) in RGB order"
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
    else:
        if not isinstance(fps, (int, float, np.integer, np.floating)) or not 1e-6 < fps < 1e9:
            raise VideoError("Video.fps must be a positive number of frames per second below 1e9")
        indices = sample_indices(total, float(fps), limits.max_frames, limits.max_fps)
        times = [index / float(fps) for index in indices]
    kept: dict[int, Frame] = {}
    wanted = sorted(set(indices))
    cap = images.ImageLimits(limits.max_image_bytes, limits.max_pixels)
    for index in wanted:
        try:
            kept[index] = np.asarray(images.load(frames[index], cap))
        except ImageError as exc:
            if video.skip_broken and index != wanted[-1]:
                continue
            raise VideoError(f"frame {index} of the video cannot be used: {exc}") from exc
        height, width = kept[index].shape[:2]
        _check_size(width, height, len(wanted), limits)
    usable = [n for n, index in enumerate(indices) if index in kept]
    used = tuple(kept[indices[n]] for n in usable)
    return Clip(used, tuple(times[n] for n in usable))


def _check_timestamps(timestamps: Sequence[float], total: int) -> list[float]:
    try:
        times = np.asarray(timestamps, np.float64)
    except (TypeError, ValueError, OverflowError):
        times = np.empty(0)
    increasing = times.shape == (total,) and times[0] >= 0 and (np.diff(times) > 0).all()
    if not (increasing and np.isfinite(times).all()):
        raise VideoError(
            f"Video.timestamps must be {total} numbers, one per frame: seconds, finite, not "
            "negative and strictly increasing"
        )
    return [float(time) for time in times]


# Files


def _container(head: bytes) -> str:
    for offset, magics, demuxer in _CONTAINERS:
        if head[offset:].startswith(magics):
            return demuxer
    raise VideoError("the file is not an MP4, MOV, Matroska, WebM, AVI, MPEG-TS or GIF video")


def _check_size(width: int, height: int, frames: int, limits: VideoLimits) -> None:
    """Check one frame, and whether as many as `frames` of its size may be kept."""
    what = "the video has frames of"
    images.check_size(what, width, height, limits.max_pixels, VideoError)
    if frames * width * height * 3 > limits.max_frame_bytes:
        raise VideoError(
            f"{frames} sampled frames of {width} x {height} pixels take more than "
            f"{limits.max_frame_bytes} bytes as RGB, the limit; send a video of lower resolution "
            "or lower the setting max_frames"
        )


def _packets(av: Any, file: BinaryIO, demuxer: str, limits: VideoLimits) -> Generator[Any]:
    """Packets of the best video stream, in decoding order, up to where the file is cut short."""
    options = {"max_pixels": str(limits.max_pixels)}
    safe = options | {"protocol_whitelist": "none", "codec_whitelist": ",".join(_DECODERS)}
    file.seek(0)
    with av.open(file, format=demuxer, options=safe, metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if stream is None:
            raise VideoError("the file contains no video")
        codec = stream.codec_context
        if codec is None or codec.name not in _DECODERS:
            raise VideoError("the video's codec is not supported; convert it to H.264, VP9 or AV1")
        _check_size(codec.width, codec.height, 1, limits)
        codec.options = options
        codec.thread_type = "SLICE"  # frame threads of FFmpeg 8 write out of bounds on damaged VP9
        codec.thread_count = 4
        try:
            yield from (packet for packet in container.demux(stream) if packet.size)
        except av.FFmpegError:
            return


class _Index(NamedTuple):
    """What the packets say. Positions count packets in the file, which are in decoding order."""

    ticks: npt.NDArray[np.int64]  # when each packet's frame begins to show
    keys: npt.NDArray[np.int64]  # positions of the key frames
    order: npt.NDArray[np.int64]  # positions in the order in which the frames are shown
    end: int  # when the last frame ends, in ticks
    tick: Fraction  # in seconds
    size: tuple[int, int]


def _index(packets: Iterator[Any], limits: VideoLimits) -> _Index:
    ticks: list[int] = []
    keys: list[int] = []
    shown: list[int] = []
    begin = end = 0
    for position, packet in enumerate(packets):
        stamp = packet.pts if packet.pts is not None else packet.dts
        stamp = end if stamp is None else stamp
        ticks.append(stamp)
        if packet.is_keyframe:
            keys.append(position)
        if packet.is_discard:  # by an edit list
            continue
        if not shown:
            begin = end = stamp
            stream = packet.stream  # not to be read once the packets are closed
            tick, size = stream.time_base, (stream.codec_context.width, stream.codec_context.height)
            guess = round(1 / (stream.average_rate * tick)) if stream.average_rate else 0
        shown.append(position)
        begin, end = min(begin, stamp), max(end, stamp + (packet.duration or guess))
        if position >= _MAX_FILE_FRAMES or (end - begin) * tick > limits.max_duration_s:
            raise VideoError(
                f"the video is longer than {limits.max_duration_s:g} seconds or {_MAX_FILE_FRAMES} "
                "frames, the limits; send a part of it or raise the setting max_video_s"
            )
    if not shown:
        raise VideoError("the video has no frames")
    times = np.asarray(ticks, np.int64)
    order = np.asarray(shown)[np.argsort(times[shown], kind="stable")]
    return _Index(times, np.asarray(keys, np.int64), order, int(end), tick, size)


def _decode(av: Any, file: BinaryIO, demuxer: str, limits: VideoLimits) -> Clip:
    index = _read_index(av, file, demuxer, limits)
    # Seconds at which the frames begin to show, ascending; the last shows to `end`.
    starts = index.ticks[index.order] * index.tick.numerator / index.tick.denominator
    end = float(index.end * index.tick)
    times = sample_times(max(end - float(starts[0]), 0.0), limits.max_frames, limits.max_fps)
    # A microsecond inside the video: the sum may fall on either side of its ends.
    moments = np.clip(np.asarray(times) + starts[0], starts[0] + 1e-6, end - 1e-6)
    indices = np.searchsorted(starts[1:], moments, side="right").tolist()
    targets = sorted(set(indices))
    _check_size(*index.size, len(targets), limits)
    needed = np.zeros(len(index.ticks), bool)
    for position in index.order[targets]:
        keys = index.keys[index.keys <= position]
        # What follows a key frame in the file but is shown before it needs the one before as well.
        keys = keys[index.ticks[keys] <= index.ticks[position]]
        # One packet more, as an interlaced frame may take two.
        needed[keys[-1] if len(keys) else 0 : position + 2] = True
    if needed.sum() * math.prod(index.size) > _MAX_DECODED_PIXELS:
        raise VideoError(
            f"{needed.sum()} frames of {index.size[0]} x {index.size[1]} pixels would have to be "
            "decoded, which is too much; send a part of the video, or one of lower resolution or "
            "with more key frames"
        )

    kept: dict[int, Frame] = {}
    waiting = deque((target, index.order[target]) for target in targets)

    def keep(frame: Any) -> None:
        _check_size(frame.width, frame.height, len(targets), limits)
        kept[waiting.popleft()[0]] = _upright(frame, limits)

    newest: Any = None
    failures = 0
    codec: Any = None
    with closing(_packets(av, file, demuxer, limits)) as packets:
        for position, packet in enumerate(chain(packets, (None,))):
            decode = packet is not None and position < len(needed) and needed[position]
            if not decode and codec is None:
                continue  # between two runs of needed packets
            if decode:
                codec = packet.stream.codec_context
            try:
                frames = codec.decode(packet if decode else None)
                failures = 0
            except av.FFmpegError as exc:
                frames, failures = [], failures + 1
                _give_up(failures, exc)
            for frame in frames:
                if frame.is_corrupt:
                    continue
                stamp = frame.pts if frame.pts is not None else frame.dts
                while waiting and stamp is not None and index.ticks[waiting[0][1]] < stamp:
                    keep(frame if newest is None else newest)
                newest = frame
                while waiting and index.ticks[waiting[0][1]] == stamp:
                    keep(frame)
            if not decode:  # the end of a run
                codec.flush_buffers()
                codec = None
                while newest is not None and waiting and waiting[0][1] < position:
                    keep(newest)
            if not waiting:
                break
    while waiting:
        if newest is None:
            raise VideoError("no frame of the video can be decoded")
        keep(newest)
    return Clip(tuple(kept[index] for index in indices), tuple(times))
