"""`warmup`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from molmo_edge.cli.common import (
    EngineOptions,
    JsonOption,
    examples,
    messages,
    output,
    with_options,
)

app = typer.Typer()


@app.command(
    epilog=examples(
        "molmo-edge warmup --config configs/thor.toml", "molmo-edge warmup --tokens 16 --json"
    )
)
@with_options
def warmup(
    engine: EngineOptions,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each request.")] = 32,
    rounds: Annotated[int, typer.Option(min=2, help="Maximum decode speeds to measure.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Run every kind of request once; fills the compile caches that later starts read."""
    with engine.open() as vlm:
        with messages.status("Warming up …"):
            report = vlm.warmup(tokens=tokens, max_rounds=rounds)
        table = Table("request", "concurrent", "seconds", "ttft")
        for step in report.steps:
            seconds = Text(step.skipped or _seconds(step.seconds))
            table.add_row(Text(step.name), str(step.requests), seconds, _seconds(step.ttft_s))
        speeds = ", ".join(f"{tps:.1f}" for tps in report.decode_tps)
        line = (
            f"decode, tok/s: {speeds} ({'steady' if report.steady else 'not steady yet'}); "
            f"warm-up {report.seconds:.1f} s, start {_seconds(report.startup_s.get('total'))}"
        )
        output(report.as_dict(), table, Text(line), as_json=as_json, vlm=vlm)


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f} s"
