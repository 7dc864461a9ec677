"""`fetch` and `quantize`: checkpoints on this machine, and ones with fewer bytes per token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from molmo_edge.cli.common import JsonOption, examples, locate_model, output, working

app = typer.Typer()


@app.command(
    epilog=examples(
        "molmo-edge fetch allenai/Molmo2-4B", "molmo-edge fetch allenai/Molmo2-4B --json"
    )
)
def fetch(
    model: Annotated[str, typer.Argument(help="Hub name, or demo, stub or stub-2.")],
    as_json: JsonOption = False,
) -> None:
    """Download a checkpoint, without its code, if it is not there yet; prints its directory."""
    directory = locate_model(model)
    output({"model": model, "directory": directory}, Text(str(directory)), as_json=as_json)


@app.command(
    epilog=examples(
        "molmo-edge quantize allenai/Molmo2-4B Molmo2-4B-w4a16 --scheme w4a16",
        "molmo-edge quantize path/to/Molmo-7B-D-0924 out --scheme w4a16 --calibrate images/",
        "molmo-edge quantize allenai/Molmo2-4B out --scheme w4a16 --head w4a16",
    )
)
def quantize(
    model: Annotated[str, typer.Argument(help="Directory, hub name or demo, not quantised yet.")],
    out: Annotated[Path, typer.Argument(help="Output directory; must not exist.")],
    scheme: Annotated[str, typer.Option(help="fp8, w4a16 or nvfp4.")],
    head: Annotated[
        str | None,
        typer.Option(help="LM head: none, fp8, w8a16 or w4a16; fp8 by default, none with fp8."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Directory of typical images, for w4a16 and nvfp4: smaller errors."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a quantised copy of a checkpoint that vLLM loads directly. Needs no GPU."""
    from molmo_edge.quantize import quantize as run

    source = locate_model(model)
    with working("reading headers …") as update:
        result = run(
            source,
            out,
            scheme,
            head=head,
            calibrate=calibrate,
            progress=lambda done, total, name: update(f"{done / total:4.0%} {name}"),
        )
    worst, error = max(result.relative_errors.items(), key=lambda item: item[1])
    summary = (
        f"{result.directory}: {result.in_bytes / 1e6:,.1f} MB → {result.out_bytes / 1e6:,.1f} MB, "
        f"largest relative error of a layer {error:.4f} ({worst}), {result.seconds:.0f} s."
    )
    output(dataclasses.asdict(result), Text(summary), as_json=as_json)
