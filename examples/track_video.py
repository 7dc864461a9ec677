"""Follow an object through a video, and write the video with its positions marked.

    python examples/track_video.py "the red disc" marked.mp4 --model allenai/Molmo2-4B
    python examples/track_video.py "the player in red" marked.mp4 --video match.mp4 --model …

Without --video it draws one: a red and a blue disc that cross. Without --model it runs the built-in
Molmo 2 of random weights, whose answers mean nothing.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from molmo_edge import EdgeVLM, Video
from molmo_edge.engine.fake import FakeEngine

FPS = 10
# What --fake answers: an object at each time at which the model is shown a frame.
ANSWER = '<tracks coords="0.0 1 250 300;0.5 1 500 400;1.0 1 750 300">it</tracks>'


def draw_discs(seconds: float = 4.0) -> Video:
    """A red disc that goes right and a blue one that goes left, on grey."""
    rows, columns = np.mgrid[:360, :640]
    frames = np.full((int(seconds * FPS), 360, 640, 3), 90, np.uint8)
    for frame, done in zip(frames, np.linspace(0, 1, len(frames)), strict=True):
        height = 180 - 80 * math.sin(math.pi * done)
        for x, y, colour in (
            (60 + 520 * done, height, (220, 40, 40)),
            (580 - 520 * done, 360 - height, (40, 80, 230)),
        ):
            frame[(columns - x) ** 2 + (rows - y) ** 2 < 40**2] = colour
    return Video(frames, fps=FPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("label")
    parser.add_argument("output", help="an .mp4 file")
    parser.add_argument("--video", help="default: one that is drawn here")
    parser.add_argument("--model", default="stub-2", help="default: %(default)s")
    parser.add_argument("--fake", action="store_true", help="scripted answers, no model")
    args = parser.parse_args()

    engine = FakeEngine.factory(ANSWER) if args.fake else None
    with EdgeVLM(args.model, engine=engine) as vlm:
        answer = vlm.track(args.video or draw_discs(), args.label)
    for number, positions in answer.tracks.items():
        for time_s, x, y in positions:
            print(f"object {number} at {time_s:.1f} s: x {x:.3f}, y {y:.3f}")
    if not answer.tracks:
        print(f"No tracks; the answer is: {answer.text}")
    if answer.truncated:
        print("The answer was cut off; raise max_tokens or show fewer frames.")
    answer.draw(args.output)


if __name__ == "__main__":
    main()
