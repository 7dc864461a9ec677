"""The commands joined into one, and what its exit statuses mean.

0: done. 1: a negative answer (nothing found, a check that failed). 2: an error of ours or wrong
usage, in one line on standard error. 130: Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from molmo_edge.cli import ask as asking
from molmo_edge.cli import bench as speed
from molmo_edge.cli import machine, quantize
from molmo_edge.cli import point as pointing
from molmo_edge.cli import verify as proof
from molmo_edge.cli import watch as watching
from molmo_edge.cli.common import complain, environment_line
from molmo_edge.errors import MolmoEdgeError

app = typer.Typer(
    name="molmo-edge",
    help="Molmo vision-language models inside your own process, on edge GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _part in (asking, pointing, watching, proof, speed, quantize, machine):
    app.add_typer(_part.app)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit status."""
    try:
        app(None if arguments is None else list(arguments), prog_name="molmo-edge")
    except MolmoEdgeError as exc:
        complain(f"{type(exc).__name__}: {exc}", "red")
        cause = exc.__cause__
        if cause is not None:
            first = (str(cause).strip().splitlines() or [""])[0]
            complain(f"caused by {type(cause).__name__}: {first}", "dim")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
