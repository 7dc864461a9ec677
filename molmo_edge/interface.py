"""Types that the engine and the model families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from PIL import Image

from molmo_edge.sampling import Sampling
from molmo_edge.video import Clip

# As in `EdgeSettings.resize`.
Resize = Literal["torch", "tensorflow"]
ImageAttention = Literal["causal", "image", "joint"]

# What `EdgeVLM` asks, ``{}`` being the label; a family may have other prompts.
PROMPTS: Mapping[str, str] = {
    "point": "Point to {}",
    "count": "How many {} are there?",
    "track": "Track {}.",
}


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: ``"user"`` or ``"assistant"``.
        text: the turn's text, unchecked.
        images: checked upright RGB images that belong to the turn.
        video: sampled frames, and their times, of a video that belongs to the turn.
    """

    role: str
    text: str
    images: tuple[Image.Image, ...] = ()
    video: Clip | None = None


@dataclass(frozen=True)
class Rendered:
    """A request ready for the engine.

    Attributes:
        prompt: input of the engine's `add`; opaque to everything else.
        prompt_tokens, image_tokens: counts, None when the engine does not know them.
        token_ids: the prompt's tokens, None when the engine does not know them.
        answer_prefix: removed from the start of the answer, such as Molmo's space.
        answer: tokens that follow the prompt as if they had been generated; not counted above.
    """

    prompt: Any
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    token_ids: Sequence[int] | None = None
    answer_prefix: str = ""
    answer: Sequence[int] = ()


class Update(NamedTuple):
    """What one step produced for one request.

    Attributes:
        text: new text; whole characters only, may be empty.
        token_ids: new tokens.
        logprobs, top_logprobs: aligned with `token_ids`, when requested.
        finish_reason: None while the request is running.
        cached_tokens: prompt tokens found in the prefix cache, when known.
        stop: the stop string that ended the answer, if one did.
    """

    request_id: str
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] | None = None
    top_logprobs: Sequence[Mapping[int, float]] | None = None
    finish_reason: str | None = None
    cached_tokens: int | None = None
    stop: str | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What an engine reports about itself once it is running.

    Attributes:
        max_model_len: longest sequence in tokens.
        environment: versions, device and settings, for results and reports.
        startup_s: seconds of each part of the start, None for what is not known: ``config``
            (settings, device, checkpoint headers; 0 after a restart), ``imports`` (of vLLM),
            ``compile`` (torch.compile, part of ``engine``), ``engine`` (all that vLLM does),
            ``total``.
    """

    max_model_len: int
    environment: Mapping[str, Any] = field(default_factory=dict)
    startup_s: Mapping[str, float | None] = field(default_factory=dict)


class Renderer(Protocol):
    """Converts turns to engine input, in any thread."""

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        """Convert turns to engine input. Raises InputError for unusable input.

        Options: ``max_crops`` (None: the engine's); ``reuse_prefix``, as in `Sampling`.
        """

    def encode(self, answer: str) -> list[int]:
        """Return the tokens of an answer, with the space or the like that answers begin with.

        Raises PromptError for special tokens in it, PromptTooLongError for one that cannot fit.
        """


class Engine(Renderer, Protocol):
    """One engine; built, stepped and closed in one thread.

    `render`, `encode` and `check_schema` alone may be called from any thread.
    """

    info: EngineInfo

    def check_schema(self, schema: Mapping[str, Any]) -> None:
        """Raise SamplingError if answers cannot be held to this JSON Schema."""

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        """Accept a request. An exception here is that request's alone."""

    def step(self) -> Sequence[Update]:
        """Run one step of all requests. An exception here is the end of the engine."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown ids are ignored."""

    def reset_caches(self) -> None:
        """Empty prefix, multimodal and encoder caches, where there are any."""

    def close(self) -> None:
        """Free memory and processes; called once, also after a failed step."""


class ModelFamily(Protocol):
    """One model family; stateless.

    Attributes:
        name: as it appears in results and reports.
        verbs: what it supports: methods of `EdgeVLM`; ``"images"``, several in one request; and
            ``"video"``.
        prompts: those that differ from `PROMPTS`.
        max_images: maximum number of images per request.
        crops: whether `max_crops` and `resize` apply.
        image_attention: what an image token sees beside the tokens before it: nothing
            (``"causal"``), its image, or all images and frames of the request (``"joint"``).
        unquantized: module patterns of the vision tower, which online quantisation skips.
    """

    name: str
    verbs: frozenset[str]
    prompts: Mapping[str, str]
    max_images: int
    crops: bool
    image_attention: ImageAttention
    unquantized: tuple[str, ...]

    def check(self, config: Mapping[str, Any], folder: Path, load_format: str) -> None:
        """Raise ModelError for a checkpoint that this family cannot run."""

    def default_crops(self, folder: Path) -> int:
        """Return the checkpoint's own `max_crops`; 1 if the family has no crops."""

    def frame_sampling(self, folder: Path) -> tuple[int, float] | None:
        """Return the checkpoint's maximum of frames and of frames per second of a video.

        None for a family without video.
        """

    def engine_args(self, max_crops: int, resize: Resize, max_frames: int) -> dict[str, Any]:
        """Return the arguments of `vllm.LLM` that the family needs.

        Args:
            max_frames: maximum frames of a video; 0 for a family without video.
        """

    def prepare(self) -> None:
        """Register with vLLM before it reads the checkpoint; once per engine, may repeat."""

    def renderer(self, engine: Any, max_crops: int, resize: Resize) -> Renderer:
        """Build the renderer in the engine's thread; it is used in every other.

        Args:
            engine: vLLM's LLMEngine or AsyncLLM.
        """
