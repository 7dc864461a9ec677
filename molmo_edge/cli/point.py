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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

app = typer.Typer()
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
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
        output(data, *_shown(answers, loaded), as_json=as_json, vlm=vlm)
        if not as_json:
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
        if not as_json:
            if counted.consistent is False:
                stated, pointed = counted.points.stated_count, counted.points.count
                warn(f"The text states {stated}, but has {pointed} points.")
            _warn_flaws([counted.points])
    if counted.number is None:
        raise typer.Exit(1)


def _with_pixels(answer: Any, image: Image.Image) -> dict[str, Any]:
    data: dict[str, Any] = answer.as_dict()
    for shown, one in zip(data["points"], answer.points, strict=True):
        shown["px"] = one.px(image.size)
    return data


def _shown(answers: Sequence[Any], image: Image.Image) -> list[Table | Text]:
    table = Table("label", "point", "x", "y", "pixel")
    missing = []
    for answer in answers:
        for one in answer.points:
            column, row = one.px(image.size)
            table.add_row(
                Text(answer.label), str(table.row_count + 1), f"{one.x:.3f}", f"{one.y:.3f}",
                f"{column}, {row}",
            )  # fmt: skip
        if not answer.points:
            why = "none found" if answer.none_found else "the answer has no point"
            missing.append(Text(f"{answer.label}: {why}"))
    return [table, *missing] if table.row_count else [*missing]


def _warn_flaws(answers: Sequence[Any]) -> None:
    for answer in answers:
        if answer.truncated:
            warn(f"{answer.label}: the answer was cut off; raise --max-tokens.")
        if answer.malformed:
            warn(f"{answer.label}: {answer.malformed} points could not be read.")


def _check_target(path: Path | None) -> None:
    """Refuse an image that cannot be written, before the engine starts."""
    if path is None:
        return
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--draw: the name must end in one of {', '.join(_SUFFIXES)}.")
    if not path.parent.is_dir():
        raise ConfigError(f"--draw: directory '{path.parent}' does not exist.")


def _draw(answers: Sequence[Any], image: Image.Image, path: Path | None) -> None:
    if path is None:
        return
    from molmo_edge.points import PointResult

    points = PointResult("", tuple(one for answer in answers for one in answer.points))
    try:
        points.draw(image).save(path)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--draw: '{path}' cannot be written.") from exc
