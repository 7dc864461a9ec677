"""Options, output and the engine that the commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text
from typer.core import TyperGroup

from molmo_edge.errors import ImageError, MolmoEdgeError, VideoError
from molmo_edge.files import expand_home, file_mode
from molmo_edge.images import ImageLimits, load, printable
from molmo_edge.models.hub import NOTICES
from molmo_edge.settings import resolve

if TYPE_CHECKING:
    from PIL import Image

    from molmo_edge.results import Result
    from molmo_edge.vlm import EdgeVLM

console = Console()
messages = Console(stderr=True)

ImageArgument = Annotated[
    str, typer.Argument(help="Image file, or - to read one from standard input.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Checkpoint directory or hub name; by default from the settings: demo."),
]
ConfigOption = Annotated[Path | None, typer.Option(help="A TOML file such as configs/thor.toml.")]
ProfileOption = Annotated[str | None, typer.Option(help="Device profile; see profiles.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Options of every command that starts an engine."""

    model: ModelOption = None
    config: ConfigOption = None
    max_crops: Annotated[
        int | None, typer.Option(help="High-resolution crops of an image; fewer answer sooner.")
    ] = None

    @contextmanager
    def open(self) -> Iterator[EdgeVLM]:
        """The engine for one command."""
        from molmo_edge import EdgeVLM

        with working("Starting the engine …"):
            vlm = EdgeVLM(self.model, config=self.config, max_crops=self.max_crops)
        with vlm as engine:
            yield engine

    def load_image(self, name: str) -> Image.Image:
        """Load an image, before the engine starts so that a wrong name is reported at once."""
        settings = resolve({}, config=self.config).settings
        limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
        if name != "-":
            return load(name, limits)
        data = sys.stdin.buffer.read(limits.max_bytes + 1)
        if not data:
            raise ImageError("standard input has no image; pipe a JPEG, PNG, WebP or BMP file in")
        return load(data, limits)


def image_and(metavar: str, text: str) -> Any:
    """The arguments of a command that takes `MediaOptions`."""
    help = f"Image file, or - to read one from standard input; {text}."
    return typer.Argument(metavar=f"[IMAGE] {metavar}", help=help)


@dataclasses.dataclass(frozen=True)
class MediaOptions:
    """What a command is about, if not one image that is its first argument."""

    image: Annotated[
        list[str] | None,
        typer.Option(help="Image file or -, in place of the argument; repeat it for several."),
    ] = None
    video: Annotated[Path | None, typer.Option(help="Video file, in place of the argument.")] = None

    def load(
        self, engine: EngineOptions, words: list[str], most: int | None = 1
    ) -> tuple[dict[str, Any], list[str]]:
        """Arguments of `EdgeVLM`'s methods, and the words that are no image, at most `most`.

        Before the engine starts, so that a wrong name is reported at once.
        """
        names = self.image or []
        if names and self.video:
            raise typer.BadParameter("give --image or --video, not both.")
        if not names and self.video is None:
            names, words = words[:1], words[1:]
        if not words or len(words) > (most or len(words)):
            raise typer.BadParameter("an argument is missing, or one too many; are all in quotes?")
        if self.video is not None:
            check_video(self.video)
            return {"image": None, "video": self.video}, words
        return {"image": [engine.load_image(name) for name in names]}, words


def check_video(path: Path) -> None:
    """Raise VideoError for a video file that is not there."""
    if not stat.S_ISREG(file_mode(expand_home(path))):
        raise VideoError(f"there is no video file {printable(path)}")


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Options of every request."""

    max_tokens: Annotated[int | None, typer.Option(help="Maximum tokens of an answer.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None
    timeout: Annotated[float | None, typer.Option(help="Seconds for one answer.")] = None

    def given(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if v is not None}


class Commands(TyperGroup):
    """Turns errors of molmo_edge and of output into one line and exit status 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if sys.stdout is None:
                raise OSError("standard output is closed")
            return super().main(*args, **kwargs)
        except OSError as exc:  # of the help, too
            _give_up_output(exc)
            sys.exit(2)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as exc:  # here, as a broken pipe would be exit status 1
            _give_up_output(exc)
            raise typer.Exit(2) from exc
        except MolmoEdgeError as exc:
            warn(f"{type(exc).__name__}: {exc}", "red")
            if (cause := exc.__cause__) is not None:
                warn(f"caused by {type(cause).__name__}: {cause}".strip().splitlines()[0], "dim")
            raise typer.Exit(2) from exc


def _give_up_output(exc: OSError) -> None:
    warn(f"{type(exc).__name__}: {exc}", "red")
    # What could not be written would fail again when Python ends.
    sys.stdout = Path(os.devnull).open("w")


@contextmanager
def working(text: str) -> Iterator[Callable[[str], object]]:
    """Show what is going on, on standard error; yields a function that changes the text.

    Where that is no terminal, a line is printed at the start and at most every ten seconds.
    """
    if messages.is_terminal:
        with messages.status(text) as status:
            yield status.update
        return
    printed = time.monotonic()

    def update(text: str) -> None:
        nonlocal printed
        if time.monotonic() - printed >= 10.0:
            printed = time.monotonic()
            warn(text, "dim")

    warn(text, "dim")
    yield update


def locate_model(model: str) -> Path:
    """Directory of a checkpoint by directory, built-in name, or hub name, which is downloaded."""
    from molmo_edge.engine.vllm_args import cache_root
    from molmo_edge.models.hub import locate

    with working(f"Looking for {model} …"):
        return locate(model, cache_root(resolve({}).settings))


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is an options dataclass by that class's own options."""
    groups: dict[str, Any] = {}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            options += inspect.signature(groups[parameter.name], eval_str=True).parameters.values()
        else:
            options.append(parameter)

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        for name, kind in groups.items():
            fields = [field.name for field in dataclasses.fields(kind)]
            given[name] = kind(**{field: given.pop(field) for field in fields})
        command(**given)

    options = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    wrapper.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {option.name: option.annotation for option in options}
    return wrapper


def notice(vlm: EdgeVLM) -> str | None:
    """What must accompany every answer of a built-in model; None for other models."""
    return NOTICES.get(str(vlm.environment.get("model")))


def warn_notice(vlm: EdgeVLM) -> None:
    if text := notice(vlm):
        warn(text)


def output(
    data: Mapping[str, Any] | list[Any],
    *shown: RenderableType,
    as_json: bool,
    vlm: EdgeVLM | None = None,
) -> None:
    """Print a result: `data` as JSON, or what is `shown` in a terminal.

    The notice of a built-in model goes to standard error, or into the JSON object together with the
    environment.
    """
    if as_json:
        if vlm is not None and isinstance(data, Mapping):
            data = {**data, "notice": notice(vlm), "environment": vlm.environment}
        write(json.dumps(data, indent=2, default=str, ensure_ascii=False) + "\n")
        return
    if vlm is not None:
        warn_notice(vlm)
    for one in shown:
        show(one)


def show(one: RenderableType) -> None:
    """Print for a terminal, through `write`: rich ends the process when a pipe is broken."""
    with console.capture() as text:
        console.print(one, soft_wrap=isinstance(one, Text))
    write(text.get())


def output_line(data: Mapping[str, Any], vlm: EdgeVLM) -> None:
    """Print one of many results as a line of JSON."""
    line = json.dumps({**data, "notice": notice(vlm)}, default=str, ensure_ascii=False)
    write(line + "\n")


def write(text: str) -> None:
    """Write text to standard output unchanged, at once."""
    print(text, end="", flush=True)


def warn(text: str, style: str = "yellow") -> None:
    """Print one line on standard error, without interpreting markup."""
    messages.print(Text(text, style), soft_wrap=True)


def result_dict(result: Result) -> dict[str, Any]:
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "parsed": result.parsed,
        "metrics": dataclasses.asdict(result.metrics),
    }


def environment_line(environment: Mapping[str, Any]) -> str:
    """The versions and device that a result comes from, in one line."""
    names = ("molmo_edge", "vllm", "torch", "transformers", "python", "device", "dtype")
    return ", ".join(f"{name} {environment[name]}" for name in names if name in environment)


def examples(*lines: str) -> str:
    """The epilog of a command's help."""
    return "Examples:\n\n" + "\n\n".join(lines)
