"""Asks about a camera's newest frame, again and again.

    python examples/camera_loop.py 0 "Is there a person?"
    python examples/camera_loop.py pictures/ "What is on the table?" --model allenai/Molmo-7B-D-0924

The source is a camera's index, a video file, a folder or a GStreamer pipeline. While one frame is
answered the camera goes on; the frames that passed meanwhile are counted, not queued.
"""

from __future__ import annotations

import argparse

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("question")
    parser.add_argument("--model", help="left out: settings decide, then the built-in stub")
    parser.add_argument("--frames", type=int, help="stop after so many")
    parser.add_argument("--fake", action="store_true", help="no model: scripted answers")
    args = parser.parse_args()

    engine = FakeEngine.factory("There is a mug.", step_s=0.01) if args.fake else None
    with EdgeVLM(args.model, engine=engine) as vlm:
        seen = vlm.watch(
            args.source,
            args.question,
            max_fps=5,
            on_stall="reconnect",
            max_crops=1,  # the global view and one crop: the fastest answer
            max_tokens=40,
            timeout=10,  # a frame that takes longer is told, and the next one is asked about
        )
        for number, one in enumerate(seen, start=1):
            said = one.result.text if one.result is not None else f"no answer ({one.error})"
            print(
                f"frame {one.index}: {said} [{one.latency_s:.2f} s old, {one.dropped} dropped]",
                flush=True,
            )
            if number == args.frames:
                break
        seen.close()


if __name__ == "__main__":
    main()
