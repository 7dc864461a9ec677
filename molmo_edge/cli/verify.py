"""`verify`: proof that answers are right here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from molmo_edge.cli.common import (
    JsonOption,
    complaints,
    console,
    environment_line,
    examples,
    print_json,
)

if TYPE_CHECKING:
    from molmo_edge.reference.verify import Report

app = typer.Typer()


@app.command(
    epilog=examples(
        "molmo-edge verify --stock",
        "molmo-edge verify --dtype bfloat16",
        "molmo-edge verify --model path/to/Molmo-7B-D-0924 --dtype bfloat16 --json",
    )
)
def verify(
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder; left out, a small seeded one is written."),
    ] = None,
    layout: Annotated[str, typer.Option(help="Layout of the seeded one: 7b-d or 7b-o.")] = "7b-d",
    dtype: Annotated[str, typer.Option(help="float32 asks for equality.")] = "float32",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, fp8, …; others than auto drift.")] = (
        "auto"
    ),
    stock: Annotated[bool, typer.Option("--stock", help="Show vLLM's own model beside it.")] = (
        False
    ),
    max_tokens: Annotated[int, typer.Option(help="Tokens to compare in each case.")] = 12,
    as_json: JsonOption = False,
) -> None:
    """Prove that answers are right here: yardstick against engine, token for token.

    Exit status 1 when molmo_edge's own model is off; vLLM's own never fails the command.
    """
    from molmo_edge.reference.verify import verify as run

    if layout not in ("7b-d", "7b-o"):
        raise typer.BadParameter("layout must be 7b-d or 7b-o.")
    reports: list[Report] = []
    with complaints.status("Running the float32 yardstick, then the engine …"):
        for report in run(
            model,
            layout=layout,  # type: ignore[arg-type]
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            stock=stock,
            max_tokens=max_tokens,
        ):
            reports.append(report)
            if not as_json:
                console.print(_table(report))
    if as_json:
        print_json([{**dataclasses.asdict(r), "ok": r.ok} for r in reports])
    else:
        console.print(f"[dim]{environment_line(reports[0].environment)}[/dim]")
    if not reports[0].ok:
        raise typer.Exit(1)


def _table(report: Report) -> Table:
    asked = (
        f"equality, |Δlogprob| ≤ {report.bound:g}"
        if report.exact
        else f"forced-token drift, |Δlogprob| ≤ {report.bound:g}"
    )
    name = "vLLM's own Molmo" if report.stock else "molmo_edge"
    table = Table(title=f"{name} against the float32 yardstick ({asked})", title_justify="left")
    for column in ("case", "prompt tokens", "tokens", "max |Δlogprob|", "verdict"):
        table.add_column(column)
    for case in report.cases:
        tokens = "equal" if case.tokens_equal else f"differ from token {case.first_different}"
        table.add_row(
            case.name,
            "equal" if case.prompt_equal else "differ",
            tokens,
            f"{case.max_dlogprob:.1e}",
            "[green]right[/green]" if case.ok else "[red]off[/red]",
        )
    return table
