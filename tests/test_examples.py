"""Every example runs as users run it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo_edge.video import VideoLimits, load_video

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    directory = tmp_path / "frames"
    directory.mkdir()
    for i in range(3):
        Image.fromarray(np.full((30, 40, 3), 60 * i, np.uint8)).save(directory / f"{i}.png")
    return directory


def test_camera_loop_answers_each_frame(frames: Path) -> None:
    lines = run("camera_loop", frames, "What is there?", "--fake").splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("frame 2: There is a mug. [")
    assert len(run("camera_loop", frames, "x", "--fake", "--frames", 1).splitlines()) == 1


def test_camera_loop_asks_about_a_video_of_the_last_frames(frames: Path) -> None:
    lines = run("camera_loop", frames, "What happens?", "--fake", "--window", 2).splitlines()
    assert [line.split(":")[0] for line in lines] == ["frame 0", "frame 1", "frame 2"]


def test_track_video_marks_the_object_in_a_video(tmp_path: Path) -> None:
    output = tmp_path / "marked.mp4"
    lines = run("track_video", "the red disc", output, "--fake").splitlines()
    assert lines[1] == "object 1 at 0.5 s: x 0.500, y 0.400" and len(lines) == 3
    clip = load_video(output, VideoLimits())
    assert clip.size == (640, 360)
    assert clip.frames[1][144, 320, 0] > 200  # the dot
    again = run("track_video", "it", tmp_path / "again.mp4", "--video", output, "--fake")
    assert again.splitlines() == lines


INTRINSICS = ("--fx", 60, "--fy", 50, "--cx", 32, "--cy", 24, "--fake")


def test_a_point_becomes_metres(tmp_path: Path) -> None:
    colour, depth = tmp_path / "colour.png", tmp_path / "depth.png"
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(colour)
    millimetres = np.full((48, 64), 1500, np.uint16)
    millimetres[24, 32] = 0  # a hole where the point is
    Image.fromarray(millimetres).save(depth)
    # The centre of pixel (32, 24) is half a pixel right of and below the principal point.
    expected = "pixel (32, 24): x +0.013 m, y +0.015 m, z 1.500 m\n"
    assert run("pick_a_point", colour, depth, "the Mug", *INTRINSICS) == expected
    np.save(tmp_path / "depth.npy", np.full((48, 64), 1.5, np.float32))
    assert run("pick_a_point", colour, tmp_path / "depth.npy", "mug", *INTRINSICS) == expected
    np.save(tmp_path / "small.npy", np.ones((24, 32)))
    error = run("pick_a_point", colour, tmp_path / "small.npy", "mug", *INTRINSICS, status=1)
    assert "depth image is 32 x 24" in error


def test_the_control_loop_keeps_its_rate_while_the_fake_engine_answers() -> None:
    output = run("async_robot", "--fake", "--seconds", 2)
    alone, busy = re.findall(r"(\d+) ticks in .* (\d+) missed, (\d+) answers", output)
    assert alone[2] == "0"
    ticks, missed, answers = map(int, busy)
    # Ticks are at fixed times, so each is either made or missed.
    assert ticks + missed >= 80
    assert missed <= 20  # on a busy machine
    assert answers >= 3


@pytest.mark.engine
@pytest.mark.slow
def test_the_quickstart_and_the_label_of_a_folder_with_the_demo(tmp_path: Path) -> None:
    root = EXAMPLES.parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    (tmp_path / "photos").mkdir()
    shutil.copy(root / "molmo_edge" / "bench" / "data" / "scene.png", tmp_path / "photos")
    arguments = ["", str(tmp_path / "photos"), str(tmp_path / "out"), "--count", "red circles"]
    code += f"""
import runpy, sys
sys.argv = {arguments!r}
runpy.run_path("examples/label_folder.py", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=root
    )
    said = re.findall(r"print\(.*# (.*)", code)
    assert done.returncode == 0, done.stderr
    *lines, labelled, row = done.stdout.splitlines()
    assert lines == said and len(said) == 5
    assert labelled.startswith("1 of 1 rows") and row.startswith("scene.png 3 red circles: ")
