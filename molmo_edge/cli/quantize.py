"""`quantize`: a checkpoint with fewer bytes per token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from molmo_edge.cli.common import JsonOption, examples, messages, output

app = typer.Typer()


@app.command(
    epilog=examples(
        "molmo-edge quantize path/to/Molmo-7B-D-0924 Molmo-7B-D-w4a16 --scheme w4a16",
        "molmo-edge quantize path/to/Molmo-7B-D-0924 Molmo-7B-D-fp8 --scheme fp8",
        "molmo-edge quantize path/to/Molmo-7B-D-0924 out --scheme w4a16 --calibrate images/",
    )
)
def quantize(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory, not quantised yet.")],
    out: Annotated[Path, typer.Argument(help="Output directory; must not exist.")],
    scheme: Annotated[str, typer.Option(help="fp8, w4a16 or nvfp4.")],
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Directory of typical images, for w4a16 and nvfp4: smaller errors."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a quantised copy of a checkpoint that vLLM loads directly. Needs no GPU."""
    from molmo_edge.quantize.run import quantize as run

    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=messages, transient=True) as bar:
        task = bar.add_task("Reading headers …", total=None)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        done = run(model, out, scheme, calibrate=calibrate, progress=progress)
    worst = max(done.relative_errors, key=lambda name: done.relative_errors[name])
    summary = (
        f"{done.folder}: {done.in_bytes / 1e9:.2f} GB → {done.out_bytes / 1e9:.2f} GB, "
        f"{len(done.relative_errors)} layers, largest relative error "
        f"{done.relative_errors[worst]:.4f} ({worst}), {done.seconds:.0f} s."
    )
    data = {**dataclasses.asdict(done), "folder": str(done.folder)}
    output(data, Text(summary), as_json=as_json)
