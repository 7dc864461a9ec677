"""A plan as tables and lines for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from molmo_edge.devices.plan import Plan, PrecisionPlan


def plan_table(plan: Plan) -> Group:
    """Render bytes, requests and ceilings for each precision, then formulas and notes."""
    lines = [
        f"Model    {plan.model} ({plan.parameters / 1e9:.2f} B parameters)",
        f"Device   {plan.device} ({_bandwidth(plan)}, {_gb(plan.usable_bytes)} usable)",
        f"Profile  {plan.profile_reason}",
        f"Choice   {plan.chosen or 'nothing fits'}: {plan.chosen_reason}",
    ]
    below = [f"· {formula}" for formula in plan.formulas]
    below += [f"· {note}" for note in plan.notes]
    for past in plan.history:
        below.append(
            f"· {past.label}: {past.tps:.1f} tok/s = {past.share:.0%} of the decode ceiling "
            f"{past.ceiling_tps:.1f} (with prefill and HTTP in its time)"
        )
    return Group(
        Text("\n".join(lines)), _memory(plan), _requests(plan), _speed(plan), Text("\n".join(below))
    )


def _memory(plan: Plan) -> Table:
    table = Table(title="Weights, GB", title_justify="left")
    for name in ("precision", "embedding", "blocks", "head", "tower", "total", "fits", "note"):
        table.add_column(name, justify="left" if name in ("precision", "note") else "right")
    for row in plan.rows:
        w = row.weights
        parts = (f"{n / 1e9:.2f}" for n in (w.embedding, w.blocks, w.head, w.tower, w.total))
        table.add_row(_label(plan, row), *parts, _yes_or_no(row.fits), row.note)
    return table


def _requests(plan: Plan) -> Table:
    table = Table(title="Concurrent requests that fit", title_justify="left")
    for name in ("KV cache dtype", "bytes per token", "tokens per request"):
        table.add_column(name, justify="left" if name == "KV cache dtype" else "right")
    for row in plan.rows:
        size = "?" if row.kv_budget_bytes is None else f"{row.kv_budget_bytes / 1e9:.2f} GB"
        table.add_column(f"{_label(plan, row)}\n{size}", justify="right")
    for dtype, size_of_token in plan.kv_bytes_per_token.items():
        for tokens in plan.rows[0].requests:
            counts = (_count(row.requests[tokens][dtype]) for row in plan.rows)
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
    for row in plan.rows:
        table.add_row(
            _label(plan, row),
            f"{row.decode_bytes / 1e9:.2f}",
            _tps(row.decode_tps),
            _tps(row.decode_tps_batch),
            _tps(row.prefill_tps),
            row.limit or "?",
        )
    return table


def _label(plan: Plan, row: PrecisionPlan) -> str:
    return f"{row.precision} *" if row.precision == plan.chosen else row.precision


def _bandwidth(plan: Plan) -> str:
    known = plan.bandwidth_bytes_s
    return "bandwidth unknown" if known is None else f"{known / 1e9:g} GB/s"


def _gb(count: int | None) -> str:
    return "memory unknown" if count is None else f"{count / 1e9:.1f} GB"


def _yes_or_no(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _tps(value: float | None) -> str:
    return "?" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
