"""`doctor`, `plan`, `profiles` and `config show`: what the machine is, fits and is set to."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from molmo_edge.cli.common import (
    ConfigOption,
    JsonOption,
    ModelOption,
    console,
    examples,
    print_json,
)
from molmo_edge.devices.profiles import load_profile, profile_names, select_profile

app = typer.Typer()
config_app = typer.Typer(help="The settings and where each of them comes from.")
app.add_typer(config_app, name="config")

ProfileOption = Annotated[str | None, typer.Option(help="Device profile; see profiles.")]


@app.command(epilog=examples("molmo-edge doctor", "molmo-edge doctor --profile thor --json"))
def doctor(
    profile: ProfileOption = None,
    running: Annotated[
        bool, typer.Option("--running", help="An engine runs already: leave free memory out.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Look at this machine and installation. Exit status 1 when something will not work."""
    from molmo_edge.devices.doctor import diagnose, diagnosis_lines

    found = diagnose(profile=None if profile is None else load_profile(profile), running=running)
    if as_json:
        print_json(found.as_dict())
    else:
        colours = {"PROBLEM": "red", "warn": "yellow"}
        for line in diagnosis_lines(found):
            style = colours.get(line.split(" ", 1)[0], "")
            console.print(Text(line, style), soft_wrap=True)
    if not found.healthy:
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "molmo-edge plan --device thor --model allenai/Molmo-7B-D-0924",
        "molmo-edge plan --model path/to/checkpoint --batch 4 --json",
    )
)
def plan(
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, or a hub name that is known.")
    ] = "allenai/Molmo-7B-D-0924",
    device: Annotated[
        str | None, typer.Option(help="thor, rtx5080, …; left out, this machine.")
    ] = None,
    profile: ProfileOption = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="auto, fp8, …")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, image included.")] = 1210,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 190,
    batch: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What fits a device, in which precision, and how fast it can be at best."""
    from molmo_edge.devices.checkpoint import model_shape
    from molmo_edge.devices.detect import detect, known_device
    from molmo_edge.devices.plan import plan as work_out
    from molmo_edge.devices.plan_view import plan_table

    made = work_out(
        model_shape(model),
        detect() if device is None else known_device(device),
        profile=None if profile is None else load_profile(profile),
        kv_cache_dtype=kv_cache_dtype,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batch=batch,
    )
    if as_json:
        print_json(made.as_dict())
    else:
        console.print(plan_table(made))


@app.command(epilog=examples("molmo-edge profiles", "molmo-edge profiles --json"))
def profiles(as_json: JsonOption = False) -> None:
    """The device profiles, and the one that fits this machine."""
    from molmo_edge.devices.detect import detect

    fitting, why = select_profile(detect())
    every = [load_profile(name) for name in profile_names()]
    if as_json:
        rows = [
            {
                "name": one.name,
                "description": one.description,
                "fits": one.name == fitting.name,
                "settings": one.as_settings(),
                "env": dict(one.env),
            }
            for one in every
        ]
        print_json({"profiles": rows, "chosen": fitting.name, "reason": why})
        return
    table = Table("profile", "for", "here")
    for one in every:
        mark = "*" if one.name == fitting.name else ""
        table.add_row(Text(one.name), Text(one.description), mark)
    console.print(table)
    console.print(f"* {why}", markup=False, highlight=False)


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
    from molmo_edge.devices.detect import detect
    from molmo_edge.settings import resolve

    def of_profile(asked: str) -> tuple[str, dict[str, Any]]:
        chosen = select_profile(detect())[0] if asked == "auto" else load_profile(asked)
        return chosen.name, chosen.as_settings()

    resolved = resolve(
        {"model": model, "profile": profile}, config=config, profile_settings=of_profile
    )
    if as_json:
        rows = {name: {"value": value, "origin": label} for name, value, label in resolved.rows()}
        print_json({"profile": resolved.profile_name, "settings": rows})
        return
    table = Table("setting", "value", "from", title=f"Settings (profile {resolved.profile_name})")
    for name, value, label in resolved.rows():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        table.add_row(Text(name), Text("not set" if value is None else text), Text(label))
    console.print(table)
