"""What a caller asks: `Request`, its options, and their way into turns and `Sampling`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, cast

from PIL import Image

from molmo_edge.errors import ImageError, PromptError, SamplingError
from molmo_edge.images import ImageLike
from molmo_edge.interface import Turn
from molmo_edge.sampling import DEFAULT_MAX_TOKENS, Sampling, check_timeout
from molmo_edge.structured import JsonSchema, Reader, prepare

Loader: TypeAlias = Callable[[ImageLike], Image.Image]
"""Loads an image within the engine's limits. Raises ImageError."""


class Options(TypedDict, total=False):
    """Options of one request; see `Sampling` for those not told here.

    json_schema: a JSON Schema, or a pydantic model class, that the answer must follow;
        `Result.parsed` is then its value. An answer that is cut off before it is complete is a
        GenerationError, which keeps the text in `.partial`.
    max_crops: high-resolution crops of the picture, at least 1; fewer answer sooner.
    timeout: seconds for the whole request, queue, prefill and decode.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: Sequence[str] | str
    logprobs: int | None
    json_schema: JsonSchema | None
    ignore_eos: bool
    max_crops: int | None
    timeout: float | None


@dataclass(frozen=True)
class Request:
    """One item of a batch: a picture (or None), a text, and options as in `Options`."""

    image: ImageLike | None
    text: str
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] | str = ()
    logprobs: int | None = None
    json_schema: JsonSchema | None = None
    ignore_eos: bool = False
    max_crops: int | None = None
    timeout: float | None = None

    def options(self) -> Options:
        """Its options as keyword arguments."""
        return cast(Options, {name: getattr(self, name) for name in Options.__annotations__})


@dataclass(frozen=True)
class Asked:
    """Options taken apart and checked; `read` makes the result of a structured answer."""

    sampling: Sampling
    max_crops: int | None
    timeout: float | None
    read: Reader | None = None


def check_options(options: Mapping[str, Any], most_crops: int) -> Asked:
    """Raises SamplingError for an unknown name or a wrong value.

    `most_crops` is the engine's own `max_crops`, which its memory was planned for.
    """
    for name in options:
        if name not in Options.__annotations__:
            near = difflib.get_close_matches(name, Options.__annotations__, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SamplingError(f"Unknown option {name}.{hint}")
    names = {field.name for field in dataclasses.fields(Sampling)}
    max_crops = options.get("max_crops")
    if max_crops is not None and (
        isinstance(max_crops, bool)
        or not isinstance(max_crops, int)
        or not 1 <= max_crops <= most_crops
    ):
        raise SamplingError(
            f"max_crops must be a whole number from 1 to the engine's {most_crops}; build "
            "EdgeVLM with a higher max_crops for more."
        )
    chosen = {name: options[name] for name in names if name in options}
    read: Reader | None = None
    if chosen.get("json_schema") is not None:
        chosen["json_schema"], read = prepare(chosen["json_schema"])
        if chosen.get("ignore_eos"):
            raise SamplingError("ignore_eos and json_schema exclude each other.")
    return Asked(
        sampling=Sampling(**chosen),
        max_crops=max_crops,
        timeout=check_timeout(options.get("timeout")),
        read=read,
    )


def check_token_ids(answer: Sequence[int]) -> list[int]:
    """The ids as a list. Raises PromptError when there are none, or what is there is no id."""
    ids = list(answer)
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise PromptError("An answer to score is a list of at least one token id.")
    return ids


def single_turn(image: ImageLike | None, text: str, load: Loader) -> list[Turn]:
    """One user turn. Raises ImageError for a picture that cannot be used."""
    return [Turn("user", text, () if image is None else (load(image),))]


def turns_of(messages: Sequence[Mapping[str, Any]], load: Loader) -> list[Turn]:
    """Chat messages to turns.

    Each message is ``{"role": "user" | "assistant", "content": …}``, its content a text or a list
    of ``{"type": "text", "text": …}`` and ``{"type": "image", "image": …}``.

    Raises:
        PromptError, ImageError.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise PromptError("messages must be a list of {'role': …, 'content': …}.")
    return [_turn(i, message, load) for i, message in enumerate(messages, start=1)]


def _turn(number: int, message: Mapping[str, Any], load: Loader) -> Turn:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise PromptError(f"Message {number} must be a mapping with 'role' and 'content' alone.")
    role, content = message["role"], message["content"]
    if role not in ("user", "assistant"):
        raise PromptError(f"Message {number}: role must be 'user' or 'assistant'.")
    if isinstance(content, str):
        return Turn(role, content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(f"Message {number}: content must be a text or a list of parts.")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and part.get("image") is not None:
            images.append(load(part["image"]))
        else:
            raise PromptError(
                f"Message {number}: a part must be {{'type': 'text', 'text': …}} or "
                "{'type': 'image', 'image': …}."
            )
    if images and role == "assistant":
        raise ImageError(f"Message {number}: an assistant's message cannot hold an image.")
    return Turn(role, "\n".join(texts), tuple(images))
