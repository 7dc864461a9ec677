"""A plan as tables and lines for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from molmo_edge.devices.plan import Plan


def plan_table(plan: Plan) -> Group:
    """Render bytes, requests and ceilings for each precision, then notes."""
    bandwidth = plan.bandwidth_bytes_s
    known = "bandwidth unknown" if bandwidth is None else f"{bandwidth / 1e9:g} GB/s"
    usable = _number(plan.usable_bytes, 1e-9, ",.1f")
    lines = [
        f"Model    {plan.model} ({plan.parameters / 1e9:.2f} B parameters)",
        f"Device   {plan.device} ({known}, {usable} GB usable)",
        f"Profile  {plan.profile_reason}",
        f"Choice   {plan.chosen or 'nothing fits'}: {plan.chosen_reason}",
    ]
    notes = "\n".join(f"· {note}" for note in plan.notes)
    tables = (_memory(plan), _requests(plan), _speed(plan))
    return Group(Text("\n".join(lines)), *tables, Text(notes))


def _memory(plan: Plan) -> Table:
    table = Table(title="Weights, GB", title_justify="left")
    for name in ("precision", "embedding", "blocks", "head", "tower", "total", "fits", "note"):
        table.add_column(name, justify="left" if name in ("precision", "note") else "right")
    for row, label in zip(plan.rows, _labels(plan), strict=True):
        w = row.weights
        parts = (f"{n / 1e9:.2f}" for n in (w.embedding, w.blocks, w.head, w.tower, w.total))
        fits = {None: "?", True: "yes", False: "no"}[row.fits]
        table.add_row(label, *parts, fits, row.note)
    return table


def _requests(plan: Plan) -> Table:
    table = Table(title="Concurrent requests that fit", title_justify="left")
    table.add_column("KV cache dtype")
    table.add_column("bytes per token", justify="right")
    table.add_column("tokens per request", justify="right")
    for row, label in zip(plan.rows, _labels(plan), strict=True):
        size = _number(row.kv_budget_bytes, 1e-9, ".2f")
        table.add_column(f"{label}\n{size} GB", justify="right")
    for dtype, size_of_token in plan.kv_bytes_per_token.items():
        for tokens in plan.rows[0].requests:
            counts = (_number(row.requests[tokens][dtype]) for row in plan.rows)
            table.add_row(dtype, f"{size_of_token:,}", f"{tokens:,}", *counts)
    return table


def _speed(plan: Plan) -> Table:
    title = (
        f"Ceilings, tok/s ({plan.prompt_tokens} prompt and {plan.output_tokens} output tokens, "
        f"KV {plan.kv_cache_dtype})"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("precision")
    for name in ("GB/step", "decode", f"decode, {plan.batch} requests", "prefill", "limit"):
        table.add_column(name, justify="right")
    for row, label in zip(plan.rows, _labels(plan), strict=True):
        speeds = (row.decode_tps, row.decode_tps_batch, row.prefill_tps)
        numbers = (_number(speed, 1, ",.1f") for speed in speeds)
        table.add_row(label, f"{row.decode_bytes / 1e9:.2f}", *numbers, row.limit or "?")
    return table


def _labels(plan: Plan) -> list[str]:
    """Names of the precisions, with a star on the one that is chosen."""
    return [r.precision + " *" * (r.precision == plan.chosen) for r in plan.rows]


def _number(value: float | None, scale: float = 1, form: str = ",.0f") -> str:
    return "?" if value is None else format(value * scale, form)
