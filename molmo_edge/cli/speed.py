"""`bench`."""

from __future__ import annotations

import typer

app = typer.Typer()


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    help="Measure speed, steadiness and ceilings; compare and report results. See bench --help.",
)
def bench(context: typer.Context) -> None:
    """Hands everything on: its imports would slow the start of the other commands."""
    from molmo_edge.bench.__main__ import app as bench_app

    bench_app(context.args, prog_name="molmo-edge bench")
