"""What the commands share: options, consoles, pictures from files and stdin, JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from molmo_edge.errors import ImageError
from molmo_edge.images import ImageLimits, load

if TYPE_CHECKING:
    from PIL import Image

    from molmo_edge.results import Result
    from molmo_edge.vlm import EdgeVLM

console = Console()
complaints = Console(stderr=True)

ImageArgument = Annotated[
    str, typer.Argument(help="Picture file, or - to read one from standard input.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Checkpoint folder or hub name; left out, settings decide, then the stub."),
]
ConfigOption = Annotated[Path | None, typer.Option(help="A TOML file, like configs/thor.toml.")]
CropsOption = Annotated[
    int | None, typer.Option(help="High-resolution crops of a picture; fewer answer sooner.")
]
TokensOption = Annotated[int | None, typer.Option(help="Most tokens of an answer.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy.")]
TimeoutOption = Annotated[float | None, typer.Option(help="Seconds for one answer.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def make_vlm(model: str | None, config: Path | None, **settings: Any) -> EdgeVLM:
    """Builds the engine; tests put another one in its place."""
    from molmo_edge.vlm import EdgeVLM

    return EdgeVLM(model, config=config, **settings)


@contextmanager
def open_vlm(
    model: str | None, config: Path | None, max_crops: int | None = None
) -> Iterator[EdgeVLM]:
    """The engine for one command."""
    with complaints.status("Starting the engine …"):
        vlm = make_vlm(model, config, max_crops=max_crops)
    with vlm:
        yield vlm


def notice(vlm: EdgeVLM) -> str | None:
    """What has to stand beside every answer of the stub; None for other models."""
    if vlm.environment.get("model") != "stub":
        return None
    from molmo_edge.models.molmo.stub import NOTICE

    return NOTICE


def tell_notice(vlm: EdgeVLM) -> None:
    """Says on standard error that it is the stub that answers."""
    told = notice(vlm)
    if told is not None:
        complain(told)


def read_picture(name: str, config: Path | None) -> Image.Image:
    """A checked picture; before the engine starts, so that a wrong name is told at once.

    Raises:
        ImageError, ConfigError.
    """
    from molmo_edge.settings import resolve

    settings = resolve({}, config=config).settings
    limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
    if name != "-":
        return load(name, limits)
    data = sys.stdin.buffer.read(limits.max_bytes + 1)
    if not data:
        raise ImageError("standard input holds no picture; pipe a JPEG, PNG, WebP or BMP file in")
    return load(data, limits)


def sampling(
    max_tokens: int | None = None,
    temperature: float | None = None,
    timeout: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Options of a request; those not given are the library's to choose."""
    given = {"max_tokens": max_tokens, "temperature": temperature, "timeout": timeout, **more}
    return {name: value for name, value in given.items() if value is not None}


def result_dict(result: Result) -> dict[str, Any]:
    """A result's plain values for JSON; a pydantic instance is never among them here."""
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "parsed": result.parsed,
        "metrics": dataclasses.asdict(result.metrics),
    }


def print_json(value: Mapping[str, Any] | list[Any], *, line: bool = False) -> None:
    """One JSON document on standard output, or one line of JSON."""
    text = json.dumps(value, indent=None if line else 2, default=str, ensure_ascii=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write(text: str) -> None:
    """Text of a model on standard output, at once and without markup."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say_cut(result: Result) -> None:
    """Says on standard error that an answer was cut off."""
    if result.finish_reason == "length":
        complain("The answer was cut off; raise --max-tokens for more.")


def complain(text: str, style: str = "yellow") -> None:
    """One line on standard error, whatever is in it."""
    complaints.print(Text(text, style), soft_wrap=True)


def environment_line(environment: Mapping[str, Any]) -> str:
    """One line that says what produced a result."""
    names = ("molmo_edge", "vllm", "torch", "transformers", "python", "device", "dtype")
    return ", ".join(f"{name} {environment[name]}" for name in names if name in environment)


def examples(*lines: str) -> str:
    """The epilog of a command's help."""
    return "Examples:\n\n" + "\n\n".join(lines)
