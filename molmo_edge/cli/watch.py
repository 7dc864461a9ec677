"""`watch`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from molmo_edge.cli.common import (
    EngineOptions,
    JsonOption,
    SamplingOptions,
    examples,
    output,
    warn,
    with_options,
    write,
)

if TYPE_CHECKING:
    from molmo_edge.watch import Seen

app = typer.Typer()


@app.command(
    epilog=examples(
        'molmo-edge watch 0 "Is somebody at the door?" --max-fps 1 --max-crops 1',
        'molmo-edge watch images/ "What is in the image?" --json',
        'molmo-edge watch "v4l2src ! videoconvert ! appsink" "What moves?" --on-stall reconnect',
    )
)
@with_options
def watch(
    source: Annotated[
        str,
        typer.Argument(help="Camera index, device, video file, directory or GStreamer pipeline."),
    ],
    engine: EngineOptions,
    sampling: SamplingOptions,
    question: Annotated[str, typer.Argument(help="Question about each frame.")] = (
        "Describe this image in one sentence."
    ),
    frames: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames.")] = None,
    max_fps: Annotated[float | None, typer.Option(help="Maximum frames per second.")] = None,
    drop: Annotated[
        Literal["oldest", "none"],
        typer.Option(help="oldest: always the newest frame; none: every frame."),
    ] = "oldest",
    frame_timeout: Annotated[
        float, typer.Option(help="Seconds without a frame that are a stall; 0: wait forever.")
    ] = 10.0,
    on_stall: Annotated[
        Literal["raise", "reconnect"], typer.Option(help="Stop, or open the source again.")
    ] = "raise",
    as_json: JsonOption = False,
) -> None:
    """Ask the same question about a camera's newest frame until Ctrl-C.

    With --json, each frame is one line of JSON.
    """
    from molmo_edge.watch import WatchOptions

    options: dict[str, Any] = {
        "drop": drop,
        "max_fps": max_fps,
        "frame_timeout": frame_timeout or None,
        "on_stall": on_stall,
    }
    # Before the engine starts, so that a wrong source or option is reported at once.
    WatchOptions(source, **options)
    # OpenCV writes its own lines about cameras that are not there.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    with engine.open() as vlm:
        if not as_json:
            output({}, as_json=False, vlm=vlm)
        with contextlib.closing(
            vlm.watch(source, question, **options, **sampling.given())
        ) as answers:
            for seen in itertools.islice(answers, frames):
                if as_json:
                    output(_as_dict(seen), as_json=True, vlm=vlm, line=True)
                else:
                    _show(seen)


def _as_dict(seen: Seen) -> dict[str, Any]:
    result = seen.result
    return {
        "index": seen.index,
        "captured_at": seen.captured_at,
        "latency_s": seen.latency_s,
        "dropped": seen.dropped,
        "reconnects": seen.reconnects,
        "text": None if result is None else result.text,
        "finish_reason": None if result is None else result.finish_reason,
        "metrics": None if result is None else dataclasses.asdict(result.metrics),
        "error": None if seen.error is None else f"{type(seen.error).__name__}: {seen.error}",
    }


def _show(seen: Seen) -> None:
    dropped = f", {seen.dropped} dropped" if seen.dropped else ""
    head = f"[{seen.index}] {seen.latency_s:.2f} s{dropped}"
    if seen.result is None:
        warn(f"{head}: {type(seen.error).__name__}: {seen.error}")
    else:
        write(f"{head}: {seen.result.text}\n")
