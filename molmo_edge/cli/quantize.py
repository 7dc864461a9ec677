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
    from molmo_edge.quantize import quantize as run

    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=messages, transient=True) as bar:
        task = bar.add_task("reading headers …", total=None)
        result = run(
            model,
            out,
            scheme,
            calibrate=calibrate,
            progress=lambda done, total, name: bar.update(
                task, completed=done, total=total, description=name
            ),
        )
    worst, error = max(result.relative_errors.items(), key=lambda item: item[1])
    summary = (
        f"{result.directory}: {result.in_bytes / 1e9:.2f} GB → {result.out_bytes / 1e9:.2f} GB, "
        f"largest relative error of a layer {error:.4f} ({worst}), {result.seconds:.0f} s."
    )
    output(dataclasses.asdict(result), Text(summary), as_json=as_json)
