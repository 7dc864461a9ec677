"""The command that labels many images: label."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from molmo_edge.cli.common import (
    EngineOptions,
    SamplingOptions,
    examples,
    output,
    warn,
    with_options,
    working,
)
from molmo_edge.errors import ConfigError
from molmo_edge.models.hub import NOTICES
from molmo_edge.settings import resolve

app = typer.Typer()

Texts = list[str] | None


def _flush(text: str) -> dict[str, Any]:
    if found := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)s", text):
        return {"flush_s": float(found[1])}
    if re.fullmatch("[1-9][0-9]{0,8}", text):
        return {"flush_rows": int(text)}
    raise ConfigError("--flush: give a number of seconds, such as 60s, or of rows, such as 1000.")


def _tasks(given: Mapping[str, Texts]) -> list[dict[str, Any]]:
    """Tasks by the options of their verbs; a name may stand before the text, as in name=text."""
    tasks: list[dict[str, Any]] = []
    for verb, texts in given.items():
        for text in texts or ():
            name, named, rest = text.partition("=")
            one: dict[str, Any] = {verb: text}
            if named and name.isidentifier():
                one = {verb: rest, "name": name}
            if verb == "choose":
                one[verb], colon, choices = one[verb].rpartition(":")
                if not colon:
                    raise ConfigError("--choose: answers follow the question and a colon.")
                one["choices"] = tuple(choice.strip() for choice in choices.split(","))
            tasks.append(one)
    return tasks


@app.command(
    epilog=examples(
        "molmo-edge label photos/ --caption long --count chairs --out labels/",
        'molmo-edge label table.parquet --ask "name=What is on the table?" --out labels/',
        'molmo-edge label "shards/*.tar" --point "red mug" --choose "open=Is it open?:Yes,No" '
        "--out labels/",
        "molmo-edge label drive.mp4 --fps 0.5 --tasks tasks.toml --out labels/",
    )
)
@with_options
def label(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Directory, images, table (.parquet, .jsonl), shard (.tar), video, or a pattern.",
        ),
    ],
    engine: EngineOptions,
    sampling: SamplingOptions,
    out: Annotated[Path, typer.Option(help="Directory of the Parquet parts to write.")],
    caption: Annotated[Texts, typer.Option(help="Describe: short, normal or long.")] = None,
    point: Annotated[Texts, typer.Option(help="Point to this.")] = None,
    count: Annotated[Texts, typer.Option(help="Count these.")] = None,
    ask: Annotated[
        Texts, typer.Option(help="Ask this; in all of these NAME=TEXT names the column.")
    ] = None,
    choose: Annotated[
        Texts, typer.Option(help="Choose an answer; QUESTION:ANSWER,ANSWER,…")
    ] = None,
    json_schema: Annotated[
        list[Path] | None,
        typer.Option(help="Answer as this JSON Schema file; its description is the question."),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="TOML file of tasks, see docs/scale.md.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Of a table; else image, path, file, …")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Of a table; names rows in place of their numbers.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames for each second of a video.")] = 1.0,
    flush: Annotated[
        str, typer.Option(help="Write a part after seconds, as 60s, or after a number of rows.")
    ] = "60s",
    limit: Annotated[int | None, typer.Option(help="Label only the first rows, on trial.")] = None,
    dedupe: Annotated[bool, typer.Option(help="Answer about equal images once.")] = False,
    restart: Annotated[bool, typer.Option(help="Delete the parts; begin anew.")] = False,
    ray: Annotated[bool, typer.Option(help="Use a Ray cluster, RAY_ADDRESS or a new one.")] = False,
    engines: Annotated[int, typer.Option(help="Engines on the cluster, one per GPU.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Label many images, each a row of a Parquet table; the same command goes on where it stopped.

    A row whose image is broken has an error in its column error, and the others go on.
    """
    from molmo_edge.label import Source
    from molmo_edge.label import label as run
    from molmo_edge.label.tasks import load_schema, load_tasks

    verbs = {"caption": caption, "point": point, "count": count, "ask": ask, "choose": choose}
    asked: list[Mapping[str, Any]] = [*_tasks(verbs), *(load_tasks(tasks) if tasks else ())]
    for path in json_schema or ():
        schema = load_schema(path)
        question = schema.get("description") or "Describe this image as JSON."
        asked.append({"name": path.stem, "ask": question, "json_schema": schema})
    given = {name: one for name, one in vars(engine).items() if one is not None}
    # As after Ctrl-C, what is answered is written: batch systems end jobs so.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with working("Reading the source …") as update:
            done = run(
                Source(sources, image_column, id_column, fps), out, asked, engine=given,
                limit=limit, restart=restart, dedupe=dedupe, ray=ray, engines=engines,
                progress=lambda progress: update(str(progress)), **_flush(flush),
                **sampling.given(),
            )  # fmt: skip
    except KeyboardInterrupt:
        warn("Stopped; the same command goes on.")
        raise
    data = {
        "rows": done.done,
        "of": done.total,
        "new": done.done - done.before,
        "errors": done.errors,
        "rows_per_s": done.rate,
        "joules": done.joules,
        "out": str(out),
    }
    if text := NOTICES.get(resolve({"model": engine.model}, config=engine.config).settings.model):
        warn(text)
    output(data, f"{done}; {out}/part-*.parquet", as_json=as_json)
    if done.errors:
        warn("Rows with an error have it in their column error.")
