"""`ask`, `caption` and `chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from molmo_edge.cli.common import (
    EngineOptions,
    ImageArgument,
    JsonOption,
    SamplingOptions,
    examples,
    notice,
    output,
    result_dict,
    warn,
    warn_truncated,
    with_options,
    write,
)
from molmo_edge.errors import ConfigError, InputError, RequestError

app = typer.Typer()


@app.command(
    epilog=examples(
        'molmo-edge ask photo.jpg "What is on the table?"',
        "ffmpeg -i in.mp4 -frames:v 1 -f image2pipe -c:v png - | molmo-edge ask - 'Who is there?'",
        'molmo-edge ask photo.jpg "Is the door open?" --schema door.json --json',
    )
)
@with_options
def ask(
    image: ImageArgument,
    question: Annotated[str, typer.Argument(help="Question about the image.")],
    engine: EngineOptions,
    sampling: SamplingOptions,
    schema: Annotated[
        Path | None, typer.Option(help="A JSON Schema file that the answer must follow.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a question about an image; the answer is printed as it is generated."""
    options = sampling.given()
    if schema is not None:
        options["json_schema"] = _read_schema(schema)
    loaded = engine.load_image(image)
    with engine.open() as vlm:
        stream = vlm.stream(loaded, question, **options)
        if as_json:
            output(result_dict(stream.result()), as_json=True, vlm=vlm)
            return
        output({}, as_json=False, vlm=vlm)
        _print_stream(stream)


@app.command(
    epilog=examples(
        "molmo-edge caption photo.jpg", "molmo-edge caption photo.jpg --length long --json"
    )
)
@with_options
def caption(
    image: ImageArgument,
    engine: EngineOptions,
    sampling: SamplingOptions,
    length: Annotated[
        Literal["short", "normal", "long"], typer.Option(help="Length of the description.")
    ] = "normal",
    as_json: JsonOption = False,
) -> None:
    """Describe an image."""
    loaded = engine.load_image(image)
    with engine.open() as vlm:
        result = vlm.caption(loaded, length, **sampling.given())
        output(result_dict(result), as_json=as_json, vlm=vlm)
        if not as_json:
            write(result.text + "\n")
            warn_truncated(result)


_HELP = "/image PATH starts over with an image, /new without one, /quit or Ctrl-D ends."


@app.command(
    epilog=examples(
        "molmo-edge chat",
        "molmo-edge chat --image photo.jpg",
        "printf '/image photo.jpg\\nWhat is this?\\nWhere?\\n' | molmo-edge chat --json",
    )
)
@with_options
def chat(
    engine: EngineOptions,
    sampling: SamplingOptions,
    image: Annotated[str | None, typer.Option(help="Image to talk about.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Talk with the model, line by line; from a pipe, each line is one question.

    /image PATH starts over with an image, /new starts over without one, /quit or Ctrl-D ends.
    Exit status 2 when lines came from a pipe and one could not be answered.
    """
    loaded = None if image is None else engine.load_image(image)
    messages: list[dict[str, Any]] = []
    failed = False
    with engine.open() as vlm:
        if stub := notice(vlm):
            warn(stub)
        for line in _lines():
            command, _, rest = line.partition(" ")
            if command == "/quit":
                break
            try:
                if command == "/image" and rest.strip():
                    loaded, messages = engine.load_image(rest.strip()), []
                elif command == "/new":
                    loaded, messages = None, []
                elif command.startswith("/"):
                    warn(_HELP, "dim")
                else:
                    content: list[Any] = [{"type": "text", "text": line}]
                    if loaded is not None and not messages:
                        content.insert(0, {"type": "image", "image": loaded})
                    question = {"role": "user", "content": content}
                    stream = vlm.chat_stream([*messages, question], **sampling.given())
                    if not as_json:
                        _print_stream(stream)
                    result = stream.result()
                    messages += [question, {"role": "assistant", "content": result.text}]
                    if as_json:
                        output(result_dict(result), as_json=True, vlm=vlm, line=True)
            except (InputError, RequestError) as exc:
                failed = True
                warn(f"{type(exc).__name__}: {exc}", "red")
    if failed and not sys.stdin.isatty():
        raise typer.Exit(2)


def _lines() -> Iterator[str]:
    """Lines from a pipe, or from the terminal with a prompt."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    warn(_HELP, "dim")
    with suppress(EOFError):
        while True:
            if line := input("> ").strip():
                yield line
    write("\n")


def _print_stream(stream: Any) -> None:
    try:
        for delta in stream:
            write(delta)
    finally:
        write("\n")
    warn_truncated(stream.result())


def _read_schema(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--schema: '{path.name}' is not a readable JSON file.") from exc
