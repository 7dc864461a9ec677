"""`point` and `count`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from molmo_edge.cli.common import (
    EngineOptions,
    ImageArgument,
    JsonOption,
    SamplingOptions,
    examples,
    output,
    warn,
    with_options,
)
from molmo_edge.errors import ConfigError
from molmo_edge.images import SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image

    from molmo_edge.points import PointAnswer

app = typer.Typer()
_HOW = {
    "points": "by its points",
    "stated": "stated, not pointed at",
    "none": "there are none",
    "unread": "the answer has no number",
}

DrawOption = Annotated[
    Path | None, typer.Option(help="Write the image with numbered markers to this file.")
]


@app.command(
    epilog=examples(
        'molmo-edge point photo.jpg "the red mug"',
        "molmo-edge point photo.jpg mug spoon --draw marked.png",
        "molmo-edge point photo.jpg mug --json | jq '.labels[0].points[0].px'",
    )
)
@with_options
def point(
    image: ImageArgument,
    label: Annotated[list[str], typer.Argument(help="What to point to; several are a batch.")],
    engine: EngineOptions,
    sampling: SamplingOptions,
    draw: DrawOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point to things in an image. Exit status 1 when nothing was found.

    x and y are from 0 to 1 from the top left corner; pixels are column and row of the upright
    image.
    """
    _check_target(draw)
    loaded = engine.load_image(image)
    with engine.open() as vlm:
        answers = vlm.point(loaded, label, **sampling.given())
        _draw(answers, loaded, draw)
        data = {
            "size": loaded.size,
            "labels": [_with_pixels(answer, loaded) for answer in answers],
            "drawn": None if draw is None else str(draw),
        }
        output(data, *_tables(answers, loaded), as_json=as_json, vlm=vlm)
        _warn_flaws(answers)
    if not any(answer.points for answer in answers):
        raise typer.Exit(1)


@app.command(
    epilog=examples("molmo-edge count photo.jpg chairs", "molmo-edge count photo.jpg cups --json")
)
@with_options
def count(
    image: ImageArgument,
    label: Annotated[str, typer.Argument(help="What to count, in the plural.")],
    engine: EngineOptions,
    sampling: SamplingOptions,
    draw: DrawOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count things in an image. Exit status 1 when the answer has no number."""
    _check_target(draw)
    loaded = engine.load_image(image)
    with engine.open() as vlm:
        counted = vlm.count(loaded, label, **sampling.given())
        _draw([counted.points], loaded, draw)
        data = {**counted.as_dict(), "points": _with_pixels(counted.points, loaded)}
        number = "unknown" if counted.number is None else str(counted.number)
        output(data, Text(f"{number} ({_HOW[counted.how]})"), as_json=as_json, vlm=vlm)
        if counted.consistent is False:
            stated, pointed = counted.points.stated_count, counted.points.count
            warn(f"The text states {stated}, but has {pointed} points.")
        _warn_flaws([counted.points])
    if counted.number is None:
        raise typer.Exit(1)


def _with_pixels(answer: PointAnswer, image: Image.Image) -> dict[str, Any]:
    data = answer.as_dict()
    for shown, one in zip(data["points"], answer.points, strict=True):
        shown["px"] = one.px(image.size)
    return data


def _tables(answers: Sequence[PointAnswer], image: Image.Image) -> Iterator[Table | Text]:
    table = Table("label", "point", "x", "y", "pixel")
    for answer in answers:
        for one in answer.points:
            column, row = one.px(image.size)
            numbers = str(table.row_count + 1), f"{one.x:.3f}", f"{one.y:.3f}", f"{column}, {row}"
            table.add_row(Text(answer.label), *numbers)
    if table.row_count:
        yield table
    for answer in answers:
        if not answer.points:
            why = "none found" if answer.none_found else "the answer has no point"
            yield Text(f"{answer.label}: {why}")


def _warn_flaws(answers: Sequence[PointAnswer]) -> None:
    for answer in answers:
        if answer.truncated:
            warn(f"{answer.label}: the answer was cut off; raise --max-tokens.")
        if answer.malformed:
            warn(f"{answer.label}: {answer.malformed} points could not be read.")


def _check_target(path: Path | None) -> None:
    """Refuse an image that cannot be written, before the engine starts."""
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--draw: the name must end in one of {', '.join(SUFFIXES)}.")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--draw: directory '{path.parent}' does not exist.")


def _draw(answers: Sequence[PointAnswer], image: Image.Image, path: Path | None) -> None:
    if path is None:
        return
    from molmo_edge.points import PointResult

    points = PointResult("", tuple(one for answer in answers for one in answer.points))
    try:
        points.draw(image).save(path)
    except (OSError, ValueError) as exc:  # a format has a largest size, of which it says either
        raise ConfigError(f"--draw: '{path}' cannot be written.") from exc
