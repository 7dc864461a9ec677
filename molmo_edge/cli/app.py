"""The `molmo-edge` command.

Exit status 0: done. 1: a negative answer (nothing found, a check that failed). 2: an error of
molmo_edge or wrong usage, in one line on standard error. 130: Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from molmo_edge.cli import bench, label, machine, quantize, verbs, verify
from molmo_edge.cli.common import Commands, environment_line

app = typer.Typer(
    name="molmo-edge",
    cls=Commands,
    help="Molmo vision-language models inside your own process, on edge GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _part in (verbs, label, verify, quantize, machine, bench):
    app.add_typer(_part.app)


def _print_version(given: bool) -> None:
    if given:
        from molmo_edge.engine.vllm_args import versions

        typer.echo(environment_line(versions()))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process with its exit status."""
    app(None if arguments is None else list(arguments), prog_name="molmo-edge")
