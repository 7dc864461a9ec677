"""Follow an object through a video, and write the video with its positions marked.

    python examples/track_video.py "red circle" marked.mp4
    python examples/track_video.py "the player in red" marked.mp4 --video match.mp4 \\
        --model allenai/Molmo2-4B

Without --video it draws one: a red circle that passes a blue square, which
the built-in demo can follow.
"""

from __future__ import annotations

import argparse

from PIL import Image, ImageDraw

from molmo_edge import EdgeVLM, Video
from molmo_edge.engine.fake import FakeEngine

FPS = 10
# What --fake answers: an object at each time at which the model is shown a frame.
ANSWER = '<tracks coords="0.0 1 250 300;0.5 1 500 400;1.0 1 750 300">it</tracks>'


def draw_clip(seconds: int = 3) -> Video:
    """A red circle that goes right above a blue square, on white."""
    frames = []
    for number in range(seconds * FPS + 1):
        frame = Image.new("RGB", (640, 360), "white")
        pen = ImageDraw.Draw(frame)
        pen.rectangle((290, 240, 350, 300), fill=(40, 80, 200))
        x = 80 + 480 * number / (seconds * FPS)
        pen.ellipse((x - 45, 80, x + 45, 170), fill=(220, 20, 30))
        frames.append(frame)
    return Video(frames, fps=FPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("label")
    parser.add_argument("output", help="an .mp4 file")
    parser.add_argument("--video", help="default: one that is drawn here")
    parser.add_argument("--model", help="default: from the settings, else the built-in demo")
    parser.add_argument("--fake", action="store_true", help="scripted answers, no model")
    args = parser.parse_args()

    engine = FakeEngine.factory(ANSWER) if args.fake else None
    with EdgeVLM(args.model, engine=engine) as vlm:
        answer = vlm.track(args.video or draw_clip(), args.label)
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
