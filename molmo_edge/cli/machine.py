"""`doctor`, `plan`, `profiles` and `config show`: the machine, what fits it and its settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from molmo_edge.cli.common import (
    ConfigOption,
    JsonOption,
    ModelOption,
    ProfileOption,
    examples,
    output,
)
from molmo_edge.devices.profiles import load_profile, profile_names, select_profile
from molmo_edge.errors import ModelError

if TYPE_CHECKING:
    from molmo_edge.devices.plan import Plan

app = typer.Typer()
config_app = typer.Typer(help="The settings and the source of each.")
app.add_typer(config_app, name="config")
_STYLES = {"problem": "red", "warn": "yellow"}


@app.command(
    epilog=examples("molmo-edge doctor", "molmo-edge doctor --config configs/thor.toml --json")
)
def doctor(
    model: ModelOption = None,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check machine, installation, settings and model. Exit status 1: something will not work."""
    from molmo_edge.engine.doctor import diagnose

    diagnosis = diagnose(config=config, model=model, profile=profile)
    lines = []
    for one in diagnosis.findings:
        text = f"{one.level:<7} {one.what}: {one.detail}"
        text += f"\n        → {one.todo}" if one.todo else ""
        lines.append(Text(text, _STYLES.get(one.level, "")))
    output(diagnosis.as_dict(), *lines, as_json=as_json)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "molmo-edge plan --device thor --model allenai/Molmo-7B-D-0924",
        "molmo-edge plan --model path/to/checkpoint --batch 4 --json",
    )
)
def plan(
    model: ModelOption = None,
    config: ConfigOption = None,
    device: Annotated[
        str | None, typer.Option(help="thor, rtx5080, …; by default this machine.")
    ] = None,
    profile: ProfileOption = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="auto, fp8, …")] = None,
    head: Annotated[
        str | None, typer.Option(help="LM head after `quantize`: fp8, w8a16 or w4a16.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, image included.")] = 1210,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 190,
    batch: Annotated[int | None, typer.Option(help="Concurrent requests.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.001, help="Memory's GB/s, such as a measured one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What fits a device, in which precision, and the upper bound of its speed."""
    from molmo_edge.devices import plan as planning
    from molmo_edge.devices.detect import known_device
    from molmo_edge.devices.shapes import model_shape
    from molmo_edge.devices.tensors import KNOWN
    from molmo_edge.engine.vllm_args import (
        cache_root,
        check_profile,
        engine_device,
        planning_settings,
        resolve_for,
    )
    from molmo_edge.models.hub import STUBS, locate, locate_cached

    about = engine_device() if device is None else known_device(device)
    given = {"model": model, "profile": profile, "kv_cache_dtype": kv_cache_dtype}
    resolved, chosen = resolve_for(about, given, config)
    check_profile(chosen, about)
    settings = resolved.settings
    root, name = cache_root(settings), settings.model
    directory = locate(name, root) if name in STUBS else locate_cached(name, root)
    if directory is None and name not in KNOWN:
        raise ModelError(f"'{name}' is not on this machine: molmo-edge fetch {name}")
    shape = replace(model_shape(directory or name), name=name)
    made = planning.plan(
        shape if head is None else shape.with_head(head),
        about,
        profile=chosen,
        settings=planning_settings(resolved),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batch=batch,
        bandwidth_bytes_s=None if bandwidth is None else bandwidth * 1e9,
    )
    output(made.as_dict(), *_plan_lines(made), as_json=as_json)


def _plan_lines(plan: Plan) -> Iterator[RenderableType]:
    """The plan's head, a table of its precisions, and its notes."""
    bandwidth = plan.bandwidth_bytes_s
    known = "bandwidth unknown" if bandwidth is None else f"{bandwidth / 1e9:g} GB/s"
    usable = _number(plan.usable_bytes, 1e-9, ",.1f")
    yield Text(
        f"Model    {plan.model} ({plan.parameters / 1e9:.3g} B parameters)\n"
        f"Device   {plan.device} ({known}, {usable} GB usable)\n"
        f"Profile  {plan.profile_reason}\n"
        f"Choice   {plan.chosen or 'nothing fits'}: {plan.chosen_reason}\n"
        f"Request  {plan.prompt_tokens:,} prompt and {plan.output_tokens:,} output tokens, KV "
        f"cache {plan.kv_cache_dtype}: {plan.kv_bytes_per_token:,} bytes per token\n"
        f"LM head  {'bf16' if plan.head == 'none' else plan.head}"
    )
    if (visuals := plan.visuals) is not None:
        images = ", ".join(f"{size} {tokens:,}" for size, tokens in visuals.image_tokens.items())
        encode, prefill = visuals.encode_bytes / 1e9, visuals.prefill_bytes / 1e9
        yield Text(
            f"Images   {images} tokens\n"
            f"Video    {visuals.frames} frames, {visuals.seconds:g} s at 2 frames/s, in "
            f"{visuals.max_model_len:,} tokens\n"
            f"Peak     at most {encode:.1f} GB to encode and {prefill:.1f} GB to prefill "
            f"{visuals.max_model_len:,} tokens"
        )
    table = Table("precision", box=SIMPLE)
    names = ("weights\nGB", "longest\nrequest", "requests\nthat fit", "GB per\nstep", "tok/s",
             f"tok/s of\n{plan.batch} together")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for row in plan.rows:
        table.add_row(
            row.precision + " *" * (row.precision == plan.chosen),
            _number(row.weight_bytes, 1e-9, ".2f"),
            {None: "?", True: f"{row.max_model_len:,}", False: "no"}[row.fits],
            _number(row.requests),
            _number(row.decode_bytes, 1e-9, ".2f"),
            _number(row.decode_tps, form=",.1f"),
            _number(row.decode_tps_batch, form=",.0f"),
        )
    yield table
    notes = [f"{row.precision}: {row.note}" for row in plan.rows if row.note]
    yield Text("\n".join(f"· {note}" for note in [*notes, *plan.notes]))


def _number(value: float | None, scale: float = 1, form: str = ",.0f") -> str:
    return "?" if value is None else format(value * scale, form)


@app.command(epilog=examples("molmo-edge profiles", "molmo-edge profiles --json"))
def profiles(as_json: JsonOption = False) -> None:
    """The device profiles, and the one that fits this machine."""
    from molmo_edge.engine.vllm_args import engine_device

    chosen, reason = select_profile(engine_device())
    table = Table("profile", "for", "fits")
    rows = []
    for profile in map(load_profile, profile_names()):
        fits = profile.name == chosen.name
        table.add_row(Text(profile.name), Text(profile.description), "*" if fits else "")
        rows.append({**asdict(profile), "fits": fits})
    data = {"profiles": rows, "chosen": chosen.name, "reason": reason}
    output(data, table, Text(f"* {reason}"), as_json=as_json)


@config_app.command(
    epilog=examples(
        "molmo-edge config show",
        "MOLMO_EDGE_MAX_CROPS=4 molmo-edge config show --config configs/thor.toml --json",
    )
)
def show(
    model: ModelOption = None,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print every setting, its value and the source it comes from."""
    from molmo_edge.engine.vllm_args import engine_device, resolve_for

    resolved, _ = resolve_for(engine_device(), {"model": model, "profile": profile}, config)
    table = Table("setting", "value", "from", title=f"Settings (profile {resolved.profile_name})")
    rows = {}
    for name, value, label in resolved.rows():
        rows[name] = {"value": value, "origin": label}
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        table.add_row(Text(name), Text("not set" if value is None else text), Text(label))
    output({"profile": resolved.profile_name, "settings": rows}, table, as_json=as_json)
