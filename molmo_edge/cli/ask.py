"""`ask`, `caption` and `chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from molmo_edge.cli.common import (
    ConfigOption,
    CropsOption,
    ImageArgument,
    JsonOption,
    ModelOption,
    TemperatureOption,
    TimeoutOption,
    TokensOption,
    complain,
    examples,
    notice,
    open_vlm,
    print_json,
    read_picture,
    result_dict,
    sampling,
    say_cut,
    tell_notice,
    write,
)
from molmo_edge.errors import ConfigError, InputError, RequestError

app = typer.Typer()


class Length(StrEnum):
    """Lengths of a caption."""

    short = "short"
    normal = "normal"
    long = "long"


@app.command(
    epilog=examples(
        'molmo-edge ask photo.jpg "What is on the table?"',
        "ffmpeg -i in.mp4 -frames:v 1 -f image2pipe -c:v png - | molmo-edge ask - 'Who is there?'",
        'molmo-edge ask photo.jpg "Is the door open?" --schema door.json --json',
    )
)
def ask(
    image: ImageArgument,
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: ModelOption = None,
    config: ConfigOption = None,
    max_crops: CropsOption = None,
    max_tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    timeout: TimeoutOption = None,
    schema: Annotated[
        Path | None, typer.Option(help="A JSON Schema file that the answer must follow.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a question about a picture; the answer is printed as it comes."""
    options = sampling(max_tokens, temperature, timeout, json_schema=_schema(schema))
    picture = read_picture(image, config)
    with open_vlm(model, config, max_crops) as vlm:
        stream = vlm.stream(picture, question, **options)
        if not as_json:
            tell_notice(vlm)
            _flow(stream)
            say_cut(stream.result())
            return
        result = stream.result()
        print_json({**result_dict(result), "notice": notice(vlm), "environment": vlm.environment})


@app.command(
    epilog=examples(
        "molmo-edge caption photo.jpg", "molmo-edge caption photo.jpg --length long --json"
    )
)
def caption(
    image: ImageArgument,
    length: Annotated[Length, typer.Option(help="How much to say.")] = Length.normal,
    model: ModelOption = None,
    config: ConfigOption = None,
    max_crops: CropsOption = None,
    max_tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a picture."""
    picture = read_picture(image, config)
    with open_vlm(model, config, max_crops) as vlm:
        result = vlm.caption(picture, length.value, **sampling(max_tokens, temperature, timeout))
        if as_json:
            told = {"notice": notice(vlm), "environment": vlm.environment}
            print_json({**result_dict(result), **told})
            return
        tell_notice(vlm)
        write(result.text + "\n")
        say_cut(result)


_HELP = "/image PATH starts over with a picture, /new without one, /quit or Ctrl-D ends."


@app.command(
    epilog=examples(
        "molmo-edge chat",
        "molmo-edge chat --image photo.jpg",
        "printf '/image photo.jpg\\nWhat is this?\\nWhere?\\n' | molmo-edge chat --json",
    )
)
def chat(
    image: Annotated[str | None, typer.Option(help="Picture to talk about.")] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    max_crops: CropsOption = None,
    max_tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk with the model, a line at a time; from a pipe, each line is one question.

    /image PATH starts over with a picture, /new starts over without one, /quit or Ctrl-D ends.
    Exit status 2 when lines came from a pipe and one could not be answered.
    """
    options = sampling(max_tokens, temperature, timeout)
    picture = None if image is None else read_picture(image, config)
    failed = False
    with open_vlm(model, config, max_crops) as vlm:
        tell_notice(vlm)
        talk = _Talk(picture)
        for line in _lines():
            if line == "/quit":
                break
            try:
                if line.startswith("/"):
                    talk.obey(line, config)
                    continue
                stream = vlm.chat_stream(talk.asked(line), **options)
                if not as_json:
                    _flow(stream)
                result = stream.result()
                talk.answered(result.text)
                if as_json:
                    print_json({**result_dict(result), "notice": notice(vlm)}, line=True)
                else:
                    say_cut(result)
            except (InputError, RequestError) as exc:
                talk.forget()
                failed = True
                complain(f"{type(exc).__name__}: {exc}", "red")
    if failed and not sys.stdin.isatty():
        raise typer.Exit(2)


class _Talk:
    """A conversation; its picture belongs to the first message."""

    def __init__(self, picture: Any = None) -> None:
        self._picture = picture
        self._messages: list[dict[str, Any]] = []

    def obey(self, line: str, config: Path | None) -> None:
        """A line that starts with a slash."""
        command, _, rest = line.partition(" ")
        if command == "/image" and rest.strip():
            self.__init__(read_picture(rest.strip(), config))  # type: ignore[misc]
        elif command == "/new":
            self.__init__()  # type: ignore[misc]
        else:
            complain(_HELP, "dim")

    def asked(self, text: str) -> list[dict[str, Any]]:
        """The conversation with one more question."""
        content: Any = text
        if not self._messages and self._picture is not None:
            content = [{"type": "image", "image": self._picture}, {"type": "text", "text": text}]
        self._messages.append({"role": "user", "content": content})
        return self._messages

    def answered(self, text: str) -> None:
        self._messages.append({"role": "assistant", "content": text})

    def forget(self) -> None:
        """Drops a question that got no answer."""
        if len(self._messages) % 2:
            self._messages.pop()


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    complain(_HELP, "dim")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            write("\n")
            return
        if line:
            yield line


def _flow(stream: Any) -> None:
    try:
        for delta in stream:
            write(delta)
    finally:
        write("\n")


def _schema(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--schema: '{path.name}' is no readable JSON file.") from exc
