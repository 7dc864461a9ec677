"""`point` and `count`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from molmo_edge.cli.common import (
    ConfigOption,
    CropsOption,
    ImageArgument,
    JsonOption,
    ModelOption,
    TemperatureOption,
    TimeoutOption,
    TokensOption,
    complain,
    console,
    examples,
    notice,
    open_vlm,
    print_json,
    read_picture,
    sampling,
    tell_notice,
)
from molmo_edge.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from molmo_edge.answers import PointAnswer

app = typer.Typer()
_DRAWN = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

DrawOption = Annotated[
    Path | None, typer.Option(help="Write the picture with numbered markers here.")
]


@app.command(
    epilog=examples(
        'molmo-edge point photo.jpg "the red mug"',
        "molmo-edge point photo.jpg mug spoon --draw marked.png",
        "molmo-edge point photo.jpg mug --json | jq '.labels[0].points[0].px'",
    )
)
def point(
    image: ImageArgument,
    label: Annotated[list[str], typer.Argument(help="What to point to; several are a batch.")],
    draw: DrawOption = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    max_crops: CropsOption = None,
    max_tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point to things in a picture. Exit status 1 when nothing was found.

    x and y are from 0 to 1 from the top left corner; pixels are column and row of the upright
    picture.
    """
    _check_target(draw)
    picture = read_picture(image, config)
    with open_vlm(model, config, max_crops) as vlm:
        answers = vlm.point(picture, label, **sampling(max_tokens, temperature, timeout))
        _draw(answers, picture, draw)
        if as_json:
            print_json(
                {
                    "size": picture.size,
                    "labels": [_with_pixels(one, picture) for one in answers],
                    "drawn": None if draw is None else str(draw),
                    "notice": notice(vlm),
                    "environment": vlm.environment,
                }
            )
        else:
            tell_notice(vlm)
            _show(answers, picture)
    if not any(one.points for one in answers):
        raise typer.Exit(1)


@app.command(
    epilog=examples("molmo-edge count photo.jpg chairs", "molmo-edge count photo.jpg cups --json")
)
def count(
    image: ImageArgument,
    label: Annotated[str, typer.Argument(help="What to count, in the plural.")],
    draw: DrawOption = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    max_crops: CropsOption = None,
    max_tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count things in a picture. Exit status 1 when the answer names no number."""
    _check_target(draw)
    picture = read_picture(image, config)
    with open_vlm(model, config, max_crops) as vlm:
        found = vlm.count(picture, label, **sampling(max_tokens, temperature, timeout))
        _draw([found.points], picture, draw)
        if as_json:
            points = _with_pixels(found.points, picture)
            told = {"notice": notice(vlm), "environment": vlm.environment}
            print_json({**found.as_dict(), "points": points, **told})
        else:
            tell_notice(vlm)
            how = {
                "points": "by its points",
                "stated": "stated, not pointed at",
                "none": "there are none",
                "unread": "the answer names no number",
            }[found.how]
            console.print("unknown" if found.number is None else str(found.number), f"({how})")
            if found.consistent is False:
                stated, pointed = found.points.stated_count, found.points.count
                complain(f"The text states {stated}, its points are {pointed}.")
            _tell_flaws(found.points)
    if found.number is None:
        raise typer.Exit(1)


def _with_pixels(answer: PointAnswer, picture: Image.Image) -> dict[str, object]:
    plain = answer.as_dict()
    for shown, one in zip(plain["points"], answer.points, strict=True):
        shown["px"] = one.px(picture.size)
    return plain


def _show(answers: list[PointAnswer], picture: Image.Image) -> None:
    table = Table("label", "point", "x", "y", "pixel")
    number = 0
    for answer in answers:
        for one in answer.points:
            number += 1
            column, row = one.px(picture.size)
            table.add_row(
                Text(answer.label), str(number), f"{one.x:.3f}", f"{one.y:.3f}", f"{column}, {row}"
            )
    if number:
        console.print(table)
    for answer in answers:
        if not answer.points:
            why = "none found" if answer.none_found else "the answer has no point"
            console.print(Text(f"{answer.label}: {why}"))
        _tell_flaws(answer)


def _tell_flaws(answer: PointAnswer) -> None:
    if answer.truncated:
        complain(f"{answer.label}: the answer was cut off; raise --max-tokens.")
    if answer.malformed:
        complain(f"{answer.label}: {answer.malformed} points could not be read.")


def _check_target(path: Path | None) -> None:
    """Raises ConfigError, before the engine starts, for a picture that could not be written."""
    if path is None:
        return
    if path.suffix.lower() not in _DRAWN:
        raise ConfigError(f"--draw: the name must end in one of {', '.join(_DRAWN)}.")
    if not path.parent.is_dir():
        raise ConfigError(f"--draw: there is no folder '{path.parent}'.")


def _draw(answers: list[PointAnswer], picture: Image.Image, path: Path | None) -> None:
    if path is None:
        return
    from molmo_edge.points import PointResult

    every = PointResult("", tuple(one for answer in answers for one in answer.points))
    try:
        every.draw(picture).save(path)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--draw: '{path}' cannot be written.") from exc
