"""`verify`: the engine against the reference implementation, on this device."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from molmo_edge.cli.common import (
    JsonOption,
    environment_line,
    examples,
    locate_model,
    output,
    show,
    working,
)

if TYPE_CHECKING:
    from molmo_edge.reference.verify import Report

Family = Literal["molmo", "molmo2"]
Layout = Literal["7b-d", "7b-o", "4b", "o-7b"]

app = typer.Typer()


@app.command(
    epilog=examples(
        "molmo-edge verify --stock",
        "molmo-edge verify --family molmo2",
        "molmo-edge verify --dtype bfloat16",
        "molmo-edge verify --model path/to/Molmo-7B-D-0924 --dtype bfloat16 --json",
    )
)
def verify(
    model: Annotated[
        str | None,
        typer.Option(help="Directory, hub name or demo; by default a small one, random weights."),
    ] = None,
    family: Annotated[
        Family | None, typer.Option(help="Of the small one: Molmo 1 (default) or Molmo 2.")
    ] = None,
    layout: Annotated[
        Layout | None, typer.Option(help="Molmo 1: 7b-d (default), 7b-o; Molmo 2: 4b, o-7b.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 requires equality.")] = "float32",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto, fp8, …; all but auto are compared with a tolerance.")
    ] = "auto",
    stock: Annotated[bool, typer.Option("--stock", help="Compare vLLM's own model too.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens to compare in each case.")] = 12,
    as_json: JsonOption = False,
) -> None:
    """Compare the engine's answers with the reference implementation, token for token.

    --stock adds vLLM's own model with its own attention; of Molmo 2, whose processor is code in the
    checkpoint, with molmo_edge's pixels. Exit status 1 when molmo_edge's own model differs; vLLM's
    own never fails the command.
    """
    from molmo_edge.reference.verify import verify as run

    reports: list[Report] = []
    directory = None if model is None else locate_model(model)
    with working("Running the float32 reference implementation, then the engine …"):
        for report in run(
            directory,
            family=family,
            layout=layout,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            stock=stock,
            max_tokens=max_tokens,
        ):
            reports.append(report)
            if not as_json:
                show(_table(report))
    data = [{**dataclasses.asdict(report), "ok": report.ok} for report in reports]
    output(data, Text(environment_line(reports[0].environment), "dim"), as_json=as_json)
    if not reports[0].ok:
        raise typer.Exit(1)


def _table(report: Report) -> Table:
    kind = "equality" if report.exact else "drift of forced tokens"
    model = {"molmo": "Molmo 1", "molmo2": "Molmo 2"}[report.family]
    name = f"{'vLLM' if report.stock else 'molmo_edge'}'s {model}"
    table = Table(
        title=f"{name} against the float32 reference ({kind}, |Δlogprob| ≤ {report.bound:g})",
        title_justify="left",
    )
    for column in ("case", "prompt tokens", "tokens", "max |Δlogprob|", "verdict"):
        table.add_column(column)
    for case in report.cases:
        tokens = "equal" if case.tokens_equal else f"differ from token {case.first_different}"
        table.add_row(
            case.name,
            "equal" if case.prompt_equal else "differ",
            tokens,
            "-" if case.max_dlogprob is None else f"{case.max_dlogprob:.1e}",
            "[green]right[/green]" if case.ok else "[red]off[/red]",
        )
    return table
