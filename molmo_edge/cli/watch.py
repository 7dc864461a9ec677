"""`watch`."""

from __future__ import annotations

import dataclasses
import os
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli.common import (
    ConfigOption,
    CropsOption,
    JsonOption,
    ModelOption,
    TemperatureOption,
    TimeoutOption,
    TokensOption,
    complain,
    examples,
    notice,
    open_vlm,
    print_json,
    sampling,
    tell_notice,
    write,
)
from molmo_edge.errors import ConfigError

if TYPE_CHECKING:
    from molmo_edge.watch import Seen

app = typer.Typer()


class Stall(StrEnum):
    """What to do about a camera that stalls."""

    error = "raise"
    reconnect = "reconnect"


class Drop(StrEnum):
    """Which frames to leave out."""

    oldest = "oldest"
    none = "none"


@app.command(
    epilog=examples(
        'molmo-edge watch 0 "Is somebody at the door?" --max-fps 1 --max-crops 1',
        'molmo-edge watch pictures/ "What is in the picture?" --json',
        'molmo-edge watch "v4l2src ! videoconvert ! appsink" "What moves?" --on-stall reconnect',
    )
)
def watch(
    source: Annotated[
        str,
        typer.Argument(help="Camera index, device, video file, folder or GStreamer pipeline."),
    ],
    question: Annotated[str, typer.Argument(help="What to ask about each frame.")] = (
        "Describe this image in one sentence."
    ),
    frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    max_fps: Annotated[float | None, typer.Option(help="Most frames to ask about a second.")] = (
        None
    ),
    drop: Annotated[
        Drop, typer.Option(help="oldest: always the newest frame; none: every frame.")
    ] = Drop.oldest,
    frame_timeout: Annotated[
        float, typer.Option(help="Seconds without a frame that are a stall; 0: wait for ever.")
    ] = 10.0,
    on_stall: Annotated[Stall, typer.Option(help="Give up, or open it again.")] = Stall.error,
    model: ModelOption = None,
    config: ConfigOption = None,
    max_crops: CropsOption = None,
    max_tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the same about a camera's newest frame, again and again; Ctrl-C ends it.

    With --json, each frame is one line of JSON.
    """
    from molmo_edge.capture import Watching

    how: dict[str, Any] = {
        "drop": drop.value,
        "max_fps": max_fps,
        "frame_timeout": frame_timeout or None,
        "on_stall": on_stall.value,
    }
    # Before the engine starts, so that a wrong source or option is told at once.
    Watching.checked(source, **how)
    if not source.strip():
        raise ConfigError("The source is empty.")
    # OpenCV writes its own lines about cameras that are not there.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    options = sampling(max_tokens, temperature, timeout)
    with open_vlm(model, config, max_crops) as vlm:
        if not as_json:
            tell_notice(vlm)
        seen = vlm.watch(source, question, **how, **options)
        try:
            for number, one in enumerate(seen, start=1):
                if as_json:
                    print_json({**_plain(one), "notice": notice(vlm)}, line=True)
                else:
                    _show(one)
                if number == frames:
                    break
        finally:
            seen.close()


def _plain(one: Seen) -> dict[str, Any]:
    return {
        "index": one.index,
        "captured_at": one.captured_at,
        "latency_s": one.latency_s,
        "dropped": one.dropped,
        "reconnects": one.reconnects,
        "text": None if one.result is None else one.result.text,
        "finish_reason": None if one.result is None else one.result.finish_reason,
        "metrics": None if one.result is None else dataclasses.asdict(one.result.metrics),
        "error": None if one.error is None else f"{type(one.error).__name__}: {one.error}",
    }


def _show(one: Seen) -> None:
    head = f"[{one.index}] {one.latency_s:.2f} s"
    if one.dropped:
        head += f", {one.dropped} dropped"
    if one.result is None:
        complain(f"{head}: {type(one.error).__name__}: {one.error}")
    else:
        write(f"{head}: {one.result.text}\n")
