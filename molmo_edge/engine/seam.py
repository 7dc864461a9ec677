"""The seam between the loop and whatever generates tokens: the real vLLM engine, or the fake.

An engine is owned by one thread. `render` alone may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from PIL import Image

from molmo_edge.sampling import Sampling


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: ``"user"`` or ``"assistant"``.
        text: the turn's text, unchecked.
        images: checked RGB pictures that belong to the turn.
        sizes: (width, height) of each before it was decoded at a fraction of its size; empty where
            none was.
    """

    role: str
    text: str
    images: tuple[Image.Image, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A request ready for the engine.

    Attributes:
        prompt: what the engine's `add` takes; nobody else looks inside.
        prompt_tokens, image_tokens: counts, None when the engine does not know them.
        token_ids: the prompt's tokens, None when the engine does not know them.
    """

    prompt: Any
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    token_ids: Sequence[int] | None = None


class Update(NamedTuple):
    """What one step brought for one request.

    Attributes:
        text: new text; whole characters only, may be empty.
        token_ids: new tokens.
        logprobs, top_logprobs: aligned with `token_ids`, when asked for.
        finish_reason: None while the request goes on.
        cached_tokens: prompt tokens found in the prefix cache, when known.
    """

    request_id: str
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] | None = None
    top_logprobs: Sequence[Mapping[int, float]] | None = None
    finish_reason: str | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself once it is up.

    Attributes:
        environment: versions, device and settings, for results and reports.
        startup_s: seconds of each part of the start, None for what is not known: ``config``
            (settings, device, checkpoint's headers), ``imports`` (of vLLM), ``engine`` (all that
            vLLM does itself; ``weights``, ``compile``, ``profile`` and ``warmup`` are parts of it,
            see `molmo_edge.engine.stages`), ``total``.
        max_model_len: longest sequence in tokens.
    """

    max_model_len: int
    environment: Mapping[str, Any] = field(default_factory=dict)
    startup_s: Mapping[str, float | None] = field(default_factory=dict)


class Engine(Protocol):
    """One engine; built, stepped and closed in one thread."""

    info: EngineInfo

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        """Turns to engine input, in any thread. Raises InputError for what cannot be used.

        Options: ``max_crops`` (None: the engine's) and ``answer``, token ids that follow the
            prompt as if they had been generated.
        """
        ...

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        """Takes a request. An exception here is that request's alone."""
        ...

    def step(self) -> Sequence[Update]:
        """One step of all requests. An exception here is the end of the engine."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drops requests; unknown ids are ignored."""
        ...

    def close(self) -> None:
        """Gives back memory and processes; called once, also after a failed step."""
        ...
