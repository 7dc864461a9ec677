"""Ask the same question about a camera's newest frame, again and again.

    python examples/camera_loop.py molmo_edge/bench/data/scene.png "How many shapes are there?"
    python examples/camera_loop.py 0 "Is there a person?" --model allenai/Molmo2-4B
    python examples/camera_loop.py 0 "What is he doing?" --window 8 --model allenai/Molmo2-4B

The source is a camera index, a video file, a directory of images or a GStreamer pipeline. Frames
that arrive while another is being answered are counted, not queued. With --window the question is
about a video of the last frames, two per second. The built-in demo knows drawn shapes only.
"""

from __future__ import annotations

import argparse

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("question")
    parser.add_argument("--model", help="default: from the settings, else the built-in demo")
    parser.add_argument("--window", type=int, help="ask about a video of this many last frames")
    parser.add_argument("--frames", type=int, help="stop after this many frames")
    parser.add_argument("--fake", action="store_true", help="scripted answers, no model")
    args = parser.parse_args()

    engine = FakeEngine.factory("There is a mug.", step_s=0.01) if args.fake else None
    with EdgeVLM(args.model, engine=engine) as vlm:
        frames = vlm.watch(
            args.source,
            args.question,
            max_fps=2 if args.window else 5,
            window=args.window,
            on_stall="reconnect",
            max_crops=1,  # the global view and one crop: the fastest answer
            max_tokens=40,
            timeout=10,  # a frame that takes longer is yielded with an error
        )
        for number, seen in enumerate(frames, start=1):
            answer = seen.result.text if seen.result is not None else f"no answer ({seen.error})"
            print(
                f"frame {seen.index}: {answer} "
                f"[{seen.latency_s:.2f} s old, {seen.dropped} dropped]",
                flush=True,
            )
            if number == args.frames:
                break
        frames.close()


if __name__ == "__main__":
    main()
