"""The `molmo-edge` command.

Exit status 0: done. 1: a negative answer (nothing found, a check that failed). 2: an error of
molmo_edge or wrong usage, in one line on standard error. 130: Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from molmo_edge.cli import ask, bench, machine, point, quantize, verify, watch
from molmo_edge.cli.common import environment_line, warn
from molmo_edge.errors import MolmoEdgeError

app = typer.Typer(
    name="molmo-edge",
    help="Molmo vision-language models inside your own process, on edge GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _part in (ask, point, watch, verify, bench, quantize, machine):
    app.add_typer(_part.app)


def _print_version(given: bool) -> None:
    if given:
        from molmo_edge.engine.build import versions

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
    run(app, arguments, "molmo-edge")


def run(commands: typer.Typer, arguments: Sequence[str] | None, name: str) -> None:
    """Run one of `commands`; errors of molmo_edge become one line on standard error."""
    try:
        commands(None if arguments is None else list(arguments), prog_name=name)
    except MolmoEdgeError as exc:
        warn(f"{type(exc).__name__}: {exc}", "red")
        cause = exc.__cause__
        if cause is not None:
            first = (str(cause).strip().splitlines() or [""])[0]
            warn(f"caused by {type(cause).__name__}: {first}", "dim")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
