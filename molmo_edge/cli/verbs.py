"""The commands that start an engine: ask, choose, caption, chat, point, count, track, watch, …"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from PIL import Image
from rich.table import Table
from rich.text import Text

from molmo_edge.cli.common import (
    EngineOptions,
    ImageArgument,
    JsonOption,
    MediaOptions,
    SamplingOptions,
    check_video,
    examples,
    image_and,
    output,
    output_line,
    result_dict,
    warn,
    warn_notice,
    with_options,
    working,
    write,
)
from molmo_edge.errors import ConfigError, InputError, RequestError
from molmo_edge.files import file_mode, replacing
from molmo_edge.images import SUFFIXES
from molmo_edge.points import CountResult, Point, PointResult, TrackResult
from molmo_edge.requests import check_choices
from molmo_edge.stream import Stream
from molmo_edge.watch import Camera

app = typer.Typer()


@app.command(
    epilog=examples(
        'molmo-edge ask photo.jpg "What is on the table?"',
        "ffmpeg -i in.mp4 -frames:v 1 -f image2pipe -c:v png - | molmo-edge ask - 'Who is there?'",
        'molmo-edge ask photo.jpg "Is the door open?" --schema door.json --json',
        'molmo-edge ask "What changed?" --image before.jpg --image after.jpg',
        'molmo-edge ask "What happens?" --video clip.mp4',
    )
)
@with_options
def ask(
    words: Annotated[list[str], image_and("QUESTION", "the question")],
    engine: EngineOptions,
    media: MediaOptions,
    sampling: SamplingOptions,
    schema: Annotated[
        Path | None, typer.Option(help="A JSON Schema file that the answer must follow.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask about an image, several, or a video; the answer is printed as it is generated."""
    options = sampling.given()
    if schema is not None:
        try:
            options["json_schema"] = json.loads(schema.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as exc:
            raise ConfigError(f"--schema: '{schema.name}' is not a readable JSON file.") from exc
    about, [question] = media.load(engine, words)
    with engine.open() as vlm:
        stream = vlm.stream(text=question, **about, **options)
        if as_json:
            output(result_dict(stream.result()), as_json=True, vlm=vlm)
        else:
            warn_notice(vlm)
            _print_stream(stream)


@app.command(
    epilog=examples(
        'molmo-edge choose door.jpg "Is the door open?" Yes No && echo open',
        'molmo-edge choose photo.jpg "What is on the table?" "a cup" "a plate" nothing --json',
        'molmo-edge choose "Did it move?" Yes No --image before.jpg --image after.jpg',
    )
)
@with_options
def choose(
    words: Annotated[list[str], image_and("QUESTION CHOICE...", "the question; answers to it")],
    engine: EngineOptions,
    media: MediaOptions,
    timeout: Annotated[float | None, typer.Option(help="Seconds for the choice.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose the likeliest of several answers. Exit status 0 for the first of them, else 1.

    Spell them as the model does, "Yes" rather than "yes": where other answers have nearly all of
    the probability, the choice means little.
    """
    about, [question, *choices] = media.load(engine, words, most=None)
    check_choices(choices)
    with engine.open() as vlm:
        choice = vlm.choose(text=question, choices=choices, timeout=timeout, **about)
        table = Table("choice", "probability")
        for name, probability in choice.probabilities.items():
            chosen = "bold" if name == choice.choice else ""
            table.add_row(Text(name, chosen), Text(f"{probability:.4f}", chosen))
        line = f"{choice}; {choice.outside:.4f} for other answers"
        data = {
            "choice": choice.choice,
            "probabilities": choice.probabilities,
            "outside": choice.outside,
            "metrics": dataclasses.asdict(choice.metrics),
        }
        output(data, table, Text(line), as_json=as_json, vlm=vlm)
    if choice.choice != choices[0]:
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "molmo-edge caption photo.jpg", "molmo-edge caption photo.jpg --length long --json"
    )
)
@with_options
def caption(
    image: ImageArgument,
    engine: EngineOptions,
    sampling: SamplingOptions,
    length: Annotated[
        Literal["short", "normal", "long"], typer.Option(help="Length of the description.")
    ] = "normal",
    as_json: JsonOption = False,
) -> None:
    """Describe an image."""
    loaded = engine.load_image(image)
    with engine.open() as vlm:
        result = vlm.caption(loaded, length, **sampling.given())
        output(result_dict(result), as_json=as_json, vlm=vlm)
        if not as_json:
            write(result.text + "\n")
            _warn_truncated(result.finish_reason == "length")


_HELP = "/image PATH starts over with an image, /new without; Ctrl-C stops an answer, Ctrl-D ends."


@app.command(
    epilog=examples(
        "molmo-edge chat",
        "molmo-edge chat --image photo.jpg",
        "printf '/image photo.jpg\\nWhat is this?\\nWhere?\\n' | molmo-edge chat --json",
    )
)
@with_options
def chat(
    engine: EngineOptions,
    sampling: SamplingOptions,
    image: Annotated[str | None, typer.Option(help="Image to talk about.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Talk with the model, line by line; from a pipe, each line is one question.

    /image PATH starts over with an image, /new starts over without one, Ctrl-D ends. Ctrl-C stops
    an answer.
    Exit status 2 when lines came from a pipe and one could not be answered.
    """
    loaded = None if image is None else engine.load_image(image)
    history: list[dict[str, Any]] = []
    failed = False
    with engine.open() as vlm:
        warn_notice(vlm)
        for line in _lines():
            command, _, name = line.partition(" ")
            try:
                if command == "/image" and name.strip():
                    loaded, history = engine.load_image(name.strip()), []
                elif command == "/new":
                    loaded, history = None, []
                elif command.startswith("/"):
                    warn(_HELP, "dim")
                else:
                    content: list[Any] = [{"type": "text", "text": line}]
                    if loaded is not None and not history:
                        content.insert(0, {"type": "image", "image": loaded})
                    question = {"role": "user", "content": content}
                    stream = vlm.chat_stream([*history, question], **sampling.given())
                    if as_json:
                        output_line(result_dict(stream.result()), vlm)
                    else:
                        _print_stream(stream)
                    answer = {"role": "assistant", "content": stream.result().text}
                    history += [question, answer]
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                warn("stopped", "dim")
            except (InputError, RequestError) as exc:
                failed = True
                warn(f"{type(exc).__name__}: {exc}", "red")
    if failed and not sys.stdin.isatty():
        raise typer.Exit(2)


def _lines() -> Iterator[str]:
    """Lines from a pipe, or from the terminal with a prompt."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    warn(_HELP, "dim")
    with contextlib.suppress(EOFError):
        while True:
            if line := input("> ").strip():
                yield line
    write("\n")


def _print_stream(stream: Stream) -> None:
    with stream:
        try:
            for delta in stream:
                write(delta)
        finally:
            write("\n")
    _warn_truncated(stream.result().finish_reason == "length")


def _warn_truncated(truncated: bool) -> None:
    if truncated:
        warn("The answer was cut off; raise --max-tokens for more.")


@app.command(
    epilog=examples(
        'molmo-edge point photo.jpg "the red mug"',
        "molmo-edge point photo.jpg mug spoon --draw marked.png",
        "molmo-edge point photo.jpg mug --json | jq '.labels[0].points[0].px'",
        "molmo-edge point boats --image one.jpg --image two.jpg",
        "molmo-edge point goals --video match.mp4",
    )
)
@with_options
def point(
    words: Annotated[list[str], image_and("LABEL...", "what to point to, several are a batch")],
    engine: EngineOptions,
    media: MediaOptions,
    sampling: SamplingOptions,
    draw: Annotated[
        Path | None,
        typer.Option(
            help="Write the image with numbered markers to this file; of several images, or frames "
            "of a video, one file each, numbered."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Point to things in images or a video. Exit status 1 when nothing was found.

    x and y are from 0 to 1 from the top left corner; pixels are column and row of the upright
    image.
    """
    _check_draw(draw, SUFFIXES)
    about, labels = media.load(engine, words, most=None)
    with engine.open() as vlm:
        answers: list[PointResult] = vlm.point(label=labels, **about, **sampling.given())
        drawn = None if draw is None else _write_drawings(answers, draw, media.video is not None)
        data = {
            "size": _size(answers[0].images[0]),
            "labels": [_with_pixels(answer) for answer in answers],
            "drawn": drawn,
        }
        lines = map(Text, _point_lines(answers))
        output(data, *lines, as_json=as_json, vlm=vlm)
        for answer in answers:
            _warn_flaws(answer)
    if not any(answer.points for answer in answers):
        raise typer.Exit(1)


_HOW = {
    "points": "by its points",
    "stated": "stated, not pointed at",
    "none": "there are none",
    "unread": "the answer has no number",
}


@app.command(
    epilog=examples(
        "molmo-edge count photo.jpg chairs",
        "molmo-edge count photo.jpg cups --json",
        "molmo-edge count jumps --video clip.mp4",
    )
)
@with_options
def count(
    words: Annotated[list[str], image_and("LABEL", "what to count, in the plural")],
    engine: EngineOptions,
    media: MediaOptions,
    sampling: SamplingOptions,
    as_json: JsonOption = False,
) -> None:
    """Count things in images or a video. Exit status 1 when the answer has no number."""
    about, [label] = media.load(engine, words)
    with engine.open() as vlm:
        counted: CountResult = vlm.count(label=label, **about, **sampling.given())
        data = {**counted.as_dict(), "points": _with_pixels(counted.points)}
        output(data, Text(_number(counted)), as_json=as_json, vlm=vlm)
        if counted.consistent is False:
            stated, pointed = counted.points.stated_count, counted.points.count
            warn(f"The text states {stated}, but has {pointed} points.")
        _warn_flaws(counted.points)
    if counted.number is None:
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        'molmo-edge track match.mp4 "the player in red" --draw marked.mp4',
        "molmo-edge track street.mp4 cars --json",
    )
)
@with_options
def track(
    video: Annotated[Path, typer.Argument(help="Video file.")],
    label: Annotated[str, typer.Argument(help="What to follow.")],
    engine: EngineOptions,
    sampling: SamplingOptions,
    draw: Annotated[
        Path | None, typer.Option(help="Write the sampled frames with markers to this .mp4 file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Follow things through a video. Exit status 1 when there are none."""
    _check_draw(draw, (".mp4",))
    check_video(video)
    with engine.open() as vlm:
        answer = vlm.track(video, label, **sampling.given())
        if draw is not None:
            answer.draw(draw)
        lines = [
            Text(f"{id} {answer.label}: {t:.1f} s, x {x:.3f}, y {y:.3f}")
            for id, positions in answer.tracks.items()
            for t, x, y in positions
        ]
        data = {**answer.as_dict(), "drawn": None if draw is None else str(draw)}
        none = [] if lines else [Text(_why_none(answer))]
        output(data, *lines, *none, as_json=as_json, vlm=vlm)
        _warn_flaws(answer)
    if not answer.tracks:
        raise typer.Exit(1)


def _check_draw(path: Path | None, suffixes: Sequence[str]) -> None:
    """Raise ConfigError for a name that cannot be written, before the engine starts."""
    if path is not None and not (
        path.suffix.lower() in suffixes
        and len(path.name.encode()) <= 255
        and stat.S_ISDIR(file_mode(path.parent))
        and not stat.S_ISDIR(file_mode(path))
        and not Path(os.path.realpath(path)).is_symlink()  # a loop
    ):
        raise ConfigError(
            f"--draw: give the name of a file in an existing directory that ends in one of "
            f"{', '.join(suffixes)}."
        )


def _size(image: Any) -> tuple[int, int]:
    """(width, height) of a PIL image or a frame."""
    return image.size if isinstance(image, Image.Image) else image.shape[1::-1]


def _pixel(answer: PointResult, point: Point) -> tuple[int, int]:
    return point.px(_size(answer.images[point.frame or point.image_index or 0]))


def _with_pixels(answer: PointResult) -> dict[str, Any]:
    data = answer.as_dict()
    for shown, one in zip(data["points"], answer.points, strict=True):
        shown["px"] = _pixel(answer, one)
    return data


def _point_lines(answers: Sequence[PointResult]) -> Iterator[str]:
    numbers = itertools.count(1)
    for answer in answers:
        for one in answer.points:
            column, row = _pixel(answer, one)
            place = f"x {one.x:.3f}, y {one.y:.3f}, pixel {column}, {row}"
            if one.t is not None:
                place = f"{one.t:.1f} s, {place}"
            elif len(answer.images) > 1 and one.image_index is not None:
                place = f"image {one.image_index + 1}, {place}"
            yield f"{next(numbers)} {answer.label}: {place}"
        if not answer.points:
            yield _why_none(answer)


def _number(counted: CountResult) -> str:
    return f"{'unknown' if counted.number is None else counted.number} ({_HOW[counted.how]})"


def _why_none(answer: PointResult | TrackResult) -> str:
    return f"{answer.label}: {'none found' if answer.none_found else 'the answer has no point'}"


def _warn_flaws(answer: PointResult | TrackResult) -> None:
    _warn_truncated(answer.truncated)
    if answer.malformed:
        warn(f"{answer.label}: {answer.malformed} points could not be read.")


def _write_drawings(answers: Sequence[PointResult], path: Path, video: bool) -> str | list[str]:
    """Write each image, or each frame with a point; return the names."""
    images = answers[0].images
    points = tuple(one for answer in answers for one in answer.points)
    frames = {one.frame for one in points if one.frame is not None}
    numbers = sorted(frames) if video else range(len(images))
    several = video or len(images) > 1
    paths = [path.with_stem(f"{path.stem}-{i + 1}") if several else path for i in numbers]
    drawing = PointResult("", points, images=images)
    for index, name in zip(numbers, paths, strict=True):
        try:
            with replacing(name) as temporary:
                drawing.draw(index=index).save(temporary)
        except (OSError, ValueError) as exc:  # a format has a largest size, of which it says either
            raise ConfigError(f"--draw: '{name}' cannot be written.") from exc
    return [str(name) for name in paths] if several else str(path)


@app.command(
    epilog=examples(
        'molmo-edge watch 0 "Is somebody at the door?" --max-fps 1 --max-crops 1',
        'molmo-edge watch images/ "What is in the image?" --json',
        'molmo-edge watch rtsp://camera.local/1 --point "red mug" --on-stall reconnect',
        'molmo-edge watch 0 "What is the person doing?" --window 8 --max-fps 2',
        'molmo-edge watch "v4l2src ! videoconvert ! appsink" "What moves?" --on-stall reconnect',
    )
)
@with_options
def watch(
    source: Annotated[
        str,
        typer.Argument(
            help="Camera index or URL, device, video file, directory or GStreamer pipeline."
        ),
    ],
    engine: EngineOptions,
    sampling: SamplingOptions,
    question: Annotated[
        str | None, typer.Argument(help="Question about each frame; by default a short caption.")
    ] = None,
    point: Annotated[str | None, typer.Option(help="Point to this in place of a question.")] = None,
    count: Annotated[str | None, typer.Option(help="Count these in place of a question.")] = None,
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
    window: Annotated[
        int | None, typer.Option(help="Ask about a video of this many last frames.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the same question about a camera's newest frame until Ctrl-C.

    With --json, each frame is one line of JSON.
    """
    options: dict[str, Any] = {
        "drop": drop,
        "max_fps": max_fps,
        "frame_timeout": frame_timeout or None,
        "on_stall": on_stall,
        "window": window,
    }
    # OpenCV writes its own lines about cameras that are not there.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    # Before the engine starts, so that a wrong source or option is reported at once.
    with contextlib.closing(Camera(source, **options)) as camera:
        if on_stall == "raise":
            camera.next_frame()
    with engine.open() as vlm:
        if not as_json:
            warn_notice(vlm)
        options |= {"point": point, "count": count}
        answers = vlm.watch(source, question, **options, **sampling.given())
        with contextlib.closing(answers):
            for seen in itertools.islice(answers, frames):
                error = None if seen.error is None else f"{type(seen.error).__name__}: {seen.error}"
                dropped = f", {seen.dropped} dropped" if seen.dropped else ""
                head = f"[{seen.index}] {seen.latency_s:.2f} s{dropped}"
                if as_json:
                    data = {
                        "index": seen.index,
                        "captured_at": seen.captured_at,
                        "latency_s": seen.latency_s,
                        "dropped": seen.dropped,
                        "skipped": seen.skipped,
                        "reconnects": seen.reconnects,
                        "error": error,
                        "text": None,
                        "points": seen.points and _with_pixels(seen.points),
                        "number": seen.count and seen.count.number,
                    }
                    output_line(data | (result_dict(seen.result) if seen.result else {}), vlm)
                elif seen.result is None:
                    warn(f"{head}: {error}")
                elif seen.count is not None:
                    write(f"{head}: {_number(seen.count)}\n")
                elif seen.points is not None:
                    write(f"{head}: {'; '.join(_point_lines([seen.points]))}\n")
                else:
                    write(f"{head}: {seen.result.text}\n")


@app.command(
    epilog=examples(
        "molmo-edge warmup --config configs/thor.toml", "molmo-edge warmup --tokens 16 --json"
    )
)
@with_options
def warmup(
    engine: EngineOptions,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each request.")] = 32,
    rounds: Annotated[int, typer.Option(min=2, help="Maximum decode speeds to measure.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Run every kind of request once; fills the compile caches that later starts read."""
    with engine.open() as vlm:
        with working("Warming up …"):
            report = vlm.warmup(tokens=tokens, max_rounds=rounds)
        table = Table("request", "concurrent", "seconds", "ttft")
        for step in report.steps:
            seconds = "too long" if step.seconds is None else _seconds(step.seconds)
            table.add_row(step.name, str(step.requests), seconds, _seconds(step.ttft_s))
        speeds = ", ".join(f"{tps:.1f}" for tps in report.decode_tps)
        line = (
            f"decode, tok/s: {speeds} ({'steady' if report.steady else 'not steady yet'}); "
            f"warm-up {report.seconds:.1f} s, start {_seconds(vlm.startup.get('total'))}"
        )
        data = {**dataclasses.asdict(report), "startup_s": dict(vlm.startup)}
        output(data, table, Text(line), as_json=as_json, vlm=vlm)


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f} s"
