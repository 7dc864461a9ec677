"""Videos: sampling, files and their limits, damaged and hostile files, frames, writing."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import struct
import sys
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_edge import Video
from molmo_edge.errors import MissingDependencyError, VideoError
from molmo_edge.video import (
    Clip,
    Frame,
    VideoLimits,
    load_video,
    sample_indices,
    sample_times,
    write_video,
)
from tests.image_files import corners, encode

GOLDEN = json.loads(
    Path(__file__).with_name("data").joinpath("molmo2/golden_extra.json").read_text()
)
LIMITS = VideoLimits()
SMALL = VideoLimits(max_frames=16, max_pixels=100_000, max_duration_s=60, max_frame_bytes=2**24)
KINDS = {
    "clip.mp4": ("mp4", "libx264"),
    "clip.mov": ("mov", "mpeg4"),
    "clip.webm": ("webm", "libvpx-vp9"),
    "clip.mkv": ("matroska", "libx264"),
    "clip.avi": ("avi", "mpeg4"),
    "clip.ts": ("mpegts", "libx264"),
}


def numbered(number: int, width: int = 64, height: int = 48) -> Frame:
    """A frame that shows its number: eight bands, black or white, lowest bit left."""
    bits = number >> np.arange(8) & 1
    return np.broadcast_to(
        (bits * 255).astype(np.uint8).repeat(width // 8)[:, None], (height, width, 3)
    )


def number(frame: Frame) -> int:
    bands = frame[24, 4::8, 0] > 127
    return int((bands << np.arange(8)).sum())


def numbers(clip: Clip) -> list[int]:
    return [number(frame) for frame in clip.frames]


@cache
def video_file(
    name: str = "clip.mp4", frames: int = 150, pts: tuple[int, ...] = (), size: Any = (64, 48)
) -> bytes:
    """Numbered frames at 30 a second, or shown at `pts` / 30 seconds."""
    container_format, codec = KINDS[name]
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=30, options={"g": "12"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(index, *size), format="rgb24")
            frame.pts, frame.time_base = (pts or range(frames))[index], Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def patched(data: bytes, atom: bytes, offset: int, value: bytes) -> bytes:
    """MP4 data with `value` at `offset` behind the name of an atom."""
    at = data.rindex(atom) + 4 + offset
    return data[:at] + value + data[at + len(value) :]


# Sampling


@pytest.mark.parametrize(
    "case", GOLDEN["sampling"], ids=lambda c: f"{c['frames']}-{c['fps']}-{c['num_frames']}"
)
def test_frames_are_sampled_as_the_reference_samples_them(case: dict[str, Any]) -> None:
    limits = case["num_frames"], 2.0
    assert sample_indices(case["frames"], case["fps"], *limits) == case["uniform"]
    times = sample_times(case["frames"] / case["fps"], *limits)
    assert times == pytest.approx(case["uniform_times"], abs=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_gives_the_frames_shown_at_the_sampled_times(name: str, tmp_path: Path) -> None:
    data = video_file(name)
    path = tmp_path / "no suffix %03d"
    path.write_bytes(data)
    array = np.frombuffer(data, np.uint8)
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    for source in (path, str(path), data, io.BytesIO(data), array, url):
        clip = load_video(source, LIMITS)
        assert clip.times == pytest.approx([i / 2 for i in range(11)])
        assert numbers(clip) == [*range(0, 150, 15), 149]
        assert clip.size == (64, 48) and clip.frames[0].shape == (48, 64, 3)


def test_a_long_file_is_sampled_evenly_over_its_whole_duration() -> None:
    clip = load_video(video_file(), VideoLimits(max_frames=7))
    assert clip.times == pytest.approx(np.linspace(0, 5, 7))
    assert numbers(clip) == [0, 25, 50, 75, 100, 125, 149]


def test_a_variable_frame_rate_is_read_from_the_time_stamps() -> None:
    pts = (10, 11, 12, 13, 40, 41, 42, 100)  # the first frame need not be at 0
    clip = load_video(video_file("clip.mkv", 8, pts), LIMITS)
    shown = [max(i for i, p in enumerate(pts) if p <= 10 + 15 * n) for n in range(7)]
    assert numbers(clip) == [*shown, 7]


def test_rotation_metadata_is_applied() -> None:
    matrix = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    clip = load_video(patched(video_file(), b"tkhd", 40, matrix), LIMITS)
    assert clip.size == (48, 64)
    assert number(np.rot90(clip.frames[1])) == 15  # was turned clockwise


# Damaged and hostile files


def test_broken_frames_are_skipped_and_counted() -> None:
    data = bytearray(video_file())
    at = data.index(b"mdat") + 3000
    data[at : at + 600] = np.random.default_rng(0).bytes(600)
    clip = load_video(bytes(data), LIMITS)
    assert len(clip.frames) == 11
    assert number(clip.frames[0]) == 0 and number(clip.frames[-1]) == 149


@pytest.mark.parametrize("name", ["clip.ts", "clip.mkv"])
def test_a_file_cut_short_gives_what_is_there(name: str) -> None:
    data = video_file(name)
    clip = load_video(data[: len(data) // 2], LIMITS)
    assert 1 < clip.times[-1] < 4 and number(clip.frames[2]) == 30


def test_a_header_that_lies_about_duration_or_size_changes_nothing() -> None:
    honest = load_video(video_file(), LIMITS)
    for atom, offset, value in (
        (b"mdhd", 16, b"\xff\xff\xff\x00"),
        (b"tkhd", 20, b"\0\0\0\1"),
        (b"tkhd", 76, b"\xff\xff\0\0" * 2),
        (b"avc1", 24, b"\xff\xff\xff\xff"),
    ):
        clip = load_video(patched(video_file(), atom, offset, value), LIMITS)
        assert clip.times == honest.times and clip.size == honest.size


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
        samples.rate = 16_000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    return file.getvalue()


REFUSED = {
    "empty": b"",
    "text": b"no video at all\n" * 100,
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n" * 20,
    "concat": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "image": encode(corners(), "PNG"),
    "sound": sound(),
    "header only": video_file()[:40],
    "half an mp4": video_file()[: len(video_file()) // 2],  # its index is at the end
    "no frames": patched(video_file(), b"stsz", 4, bytes(8)),
    "nothing decodes": patched(video_file(), b"mdat", 0, bytes(len(video_file()) // 2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_files_are_video_errors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "secret.mp4"
    path.write_bytes(REFUSED[name])
    for source in (path, REFUSED[name]):
        with pytest.raises(VideoError) as caught:
            load_video(source, LIMITS)
        assert ("secret" in str(caught.value)) == (source == path)
        assert "0x" not in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(max_bytes=1000), "bytes, the limit"),
        (VideoLimits(max_pixels=64 * 48 - 1), "64 x 48 pixels"),
        (VideoLimits(max_duration_s=4.9), "longer than 4.9 seconds"),
        (VideoLimits(max_frame_bytes=10 * 64 * 48 * 3), "sampled frames"),
    ],
)
def test_every_limit_holds(limits: VideoLimits, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        load_video(video_file(), limits)


def test_the_work_of_decoding_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molmo_edge.video._MAX_DECODED_PIXELS", 20 * 64 * 48)
    with pytest.raises(VideoError, match="too much"):
        load_video(video_file(), LIMITS)


@pytest.mark.parametrize("url", ["https://host/a.mp4", "rtsp://host/a", "file:///etc/a.mp4", ""])
def test_nothing_is_fetched(url: str) -> None:
    with pytest.raises(VideoError, match="fetches nothing"):
        load_video(url, LIMITS)


@pytest.mark.timeout(10)
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(VideoError, match="regular file"):
            load_video(path, LIMITS)
    for name in ("missing.mp4", "x" * 300, "a\u00a0\u3000b\0"):
        with pytest.raises(VideoError, match=rf"{name[-9:-1]}.': could not read the video file"):
            load_video(tmp_path / name, LIMITS)
    with pytest.raises(VideoError, match="type int"):
        load_video(3, LIMITS)  # type: ignore[arg-type]


def test_without_a_decoder_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video_file()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"molmo-edge\[video\]"):
        load_video(data, LIMITS)


@settings(max_examples=int(os.environ.get("MOLMO_EDGE_FUZZ_EXAMPLES", "50")), deadline=None)
@given(
    name=st.sampled_from(sorted(KINDS)),
    edits=st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8), st.booleans()
        ),
        min_size=1,
        max_size=5,
    ),
    cut=st.floats(0.5, 1),
)
def test_fuzzed_files_load_or_are_video_errors(name: str, edits: Any, cut: float) -> None:
    data = bytearray(video_file(name, 40))
    for place, value, header in edits:
        at = int(place * (1500 if header else len(data)))
        data[at : at + len(value)] = value
    try:
        clip = load_video(data[: int(cut * len(data))], SMALL)
    except VideoError:
        return
    assert len(clip.frames) == len(clip.times) <= SMALL.max_frames


# Frames


def test_frames_with_a_rate_are_sampled_by_index() -> None:
    array = np.stack([numbered(i) for i in range(90)])
    for frames in (array, list(array)):
        clip = load_video(Video(frames, fps=30), LIMITS)
        assert numbers(clip) == [0, 15, 30, 45, 60, 75, 89]
        assert clip.times == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 89 / 30])


def test_frames_with_timestamps_are_used_as_they_are() -> None:
    frames = [numbered(0), encode(corners(), "PNG"), corners()]
    clip = load_video(Video(frames, timestamps=(0.25, 1, 4.25)), LIMITS)
    assert clip.times == (0.25, 1.0, 4.25) and clip.size == (64, 48)
    assert [frame.shape for frame in clip.frames] == [(48, 64, 3), (32, 48, 3), (32, 48, 3)]
    broken = Video([b"", *frames], timestamps=range(4), skip_broken=True)
    clip = load_video(broken, LIMITS)
    assert (clip.times, len(clip.frames)) == ((1.0, 2.0, 3.0), 3)


ONE = np.zeros((1, 4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (Video(ONE), "either"),
        (Video(ONE, [0.0], 2.0), "either"),
        (Video(ONE[:0], fps=2), "no frames"),
        (Video([], fps=2), "no frames"),
        (Video(ONE.astype(float), fps=2), "uint8 array"),
        (Video(ONE[0], fps=2), "uint8 array"),
        (Video(b"bytes", fps=2), "sequence of images"),  # type: ignore[arg-type]
        (Video([ONE], fps=2), "frame 0"),  # type: ignore[list-item]
        (Video(["https://host/a.png"], fps=2), "frame 0"),
        (Video(ONE, fps=0), "positive"),
        (Video(ONE, fps=math.nan), "positive"),
        (Video(ONE, fps=10**400), "positive"),
        (Video(ONE, timestamps=[0, 1]), "one per frame"),
        (Video(ONE, timestamps=["x"]), "one per frame"),
        (Video(ONE, timestamps=[math.nan]), "increasing"),
        (Video(ONE, timestamps=[10**400]), "finite"),
        (Video(ONE, timestamps=[-1]), "not negative"),
        (Video([ONE[0]] * 2, timestamps=[1, 1]), "increasing"),
        (Video([ONE[0]] * 17, timestamps=range(17)), "17 frames .* 16"),
        (Video(np.zeros((2, 400, 400, 3), np.uint8), fps=2), "pixels"),
    ],
)
def test_frames_that_make_no_video_are_refused(video: Video, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        load_video(video, SMALL)


# Writing


def test_a_written_video_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    write_video(path, (numbered(i, 64, 49) for i in range(20)), 10)
    clip = load_video(path, LIMITS)
    assert clip.size == (64, 50) and clip.times == pytest.approx((0, 0.5, 1, 1.5, 2))
    assert numbers(clip) == [0, 5, 10, 15, 19]


@pytest.mark.parametrize("frames", [[], [ONE[0].astype(float)]])
def test_a_failed_write_leaves_the_directory_as_it_was(
    frames: Iterable[Frame], tmp_path: Path
) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"before")
    with pytest.raises(VideoError):
        write_video(path, frames, 10)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
