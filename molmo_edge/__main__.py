"""The command line: `molmo-edge` and `python -m molmo_edge`. Only parses and prints."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from molmo_edge.errors import MolmoEdgeError

app = typer.Typer(
    name="molmo-edge",
    help="Molmo vision-language models inside your own process, on edge GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
complaints = Console(stderr=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _version(asked: bool) -> None:
    if asked:
        from molmo_edge.engine.build import versions

        typer.echo(environment_line(versions()))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    pass


@app.command()
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

    Examples:  molmo-edge verify --stock    molmo-edge verify --dtype bfloat16
    """
    from molmo_edge.verify import Report, verify as run

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
                console.print(_verify_table(report))
    if as_json:
        _print_json([{**dataclasses.asdict(r), "ok": r.ok} for r in reports])
    else:
        console.print(f"[dim]{environment_line(reports[0].environment)}[/dim]")
    if not reports[0].ok:
        raise typer.Exit(1)


def _verify_table(report: Any) -> Table:
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


def environment_line(environment: Any) -> str:
    """One line that says what produced a result."""
    names = ("molmo_edge", "vllm", "torch", "transformers", "python", "device", "dtype")
    return ", ".join(f"{name} {environment[name]}" for name in names if name in environment)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def main() -> None:
    """Runs a command; errors of ours are one line and exit status 2."""
    try:
        app()
    except MolmoEdgeError as exc:
        complaints.print(f"[red]{type(exc).__name__}[/red]: {exc}", highlight=False)
        cause = exc.__cause__
        if cause is not None:
            complaints.print(f"[dim]caused by {type(cause).__name__}: {cause}[/dim]")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
