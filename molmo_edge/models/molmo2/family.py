"""AllenAI's Molmo 2 as a model family: registration with vLLM, and turns to engine input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.errors import ConfigError, PromptTooLongError
from molmo_edge.interface import ImageAttention, Rendered, Renderer, Resize, Turn
from molmo_edge.models.checkpoint import check_files
from molmo_edge.models.hashing import ImageHasher
from molmo_edge.models.molmo2.config import ARCHITECTURE, ImageIds, Processing, check_layout
from molmo_edge.models.molmo2.prompts import PromptEncoder, frame_tokens, image_tokens
from molmo_edge.requests import check_length

# vLLM's own model under another name, for `molmo-edge verify --stock`.
STOCK_ARCHITECTURE = f"Stock{ARCHITECTURE}"


class Molmo2:
    """AllenAI's Molmo 2 (4B, 8B, O-7B, ER, VideoPoint)."""

    name = "molmo2"
    verbs = frozenset(
        {"query", "chat", "choose", "caption", "point", "count", "track", "images", "video"}
    )
    prompts: Mapping[str, str] = {"point": "Point to {}."}
    # As many as the context holds.
    max_images = 10_000
    crops = True
    image_attention: ImageAttention = "joint"
    unquantized: tuple[str, ...] = ("vision_backbone.*",)

    def check(self, config: Mapping[str, Any], folder: Path, load_format: str) -> None:
        check_layout(config)
        Processing.read(folder)
        check_files(config, folder, load_format)

    def default_crops(self, folder: Path) -> int:
        return Processing.read(folder).max_crops

    def frame_sampling(self, folder: Path) -> tuple[int, float]:
        processing = Processing.read(folder)
        return processing.max_frames, processing.max_fps

    def engine_args(self, max_crops: int, resize: Resize, max_frames: int) -> dict[str, Any]:
        if resize != "torch":
            raise ConfigError(
                "Molmo 2 was trained with torch's resize; resize must be torch for it."
            )
        return {
            "mm_processor_kwargs": {"max_crops": max_crops},
            # All images of a request are one item.
            "limit_mm_per_prompt": {"image": 1, "video": 1},
        }

    def prepare(self) -> None:
        from vllm import ModelRegistry
        from vllm.plugins import load_general_plugins

        load_general_plugins()  # runs once per process, and registers the name: not after the class
        register()
        # The class itself: for a name, vLLM starts one more process to inspect it.
        from molmo_edge.models.molmo2.vllm_model import Molmo2ForConditionalGeneration

        ModelRegistry.register_model(ARCHITECTURE, Molmo2ForConditionalGeneration)

    def renderer(self, engine: Any, max_crops: int, resize: Resize) -> Renderer:
        return Molmo2Renderer(engine, max_crops)


def register() -> None:
    """Make vLLM and transformers read Molmo 2 with this package's classes; may repeat."""
    from vllm import ModelRegistry

    from molmo_edge.models.molmo2 import hf, video_files  # noqa: F401 - registers itself
    from molmo_edge.models.vllm_workarounds import prefill_in_one_step

    hf.register()
    prefill_in_one_step(ARCHITECTURE)
    ModelRegistry.register_model(
        ARCHITECTURE, f"molmo_edge.models.molmo2.vllm_model:{ARCHITECTURE}"
    )
    ModelRegistry.register_model(
        STOCK_ARCHITECTURE, f"vllm.model_executor.models.molmo2:{ARCHITECTURE}"
    )


class Molmo2Renderer:
    """Renders for one engine, which is read only here; `max_crops` may be a request's own."""

    def __init__(self, engine: Any, max_crops: int) -> None:
        model = engine.model_config
        self._max_model_len = int(model.max_model_len)
        self._encoder = PromptEncoder(engine.get_tokenizer(), self._max_model_len)
        self._ids = ImageIds.from_config(model.hf_config.to_dict())
        self._processing = Processing.read(Path(model.model))
        self._max_crops = max_crops
        self._hash = ImageHasher()

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        """See `Engine.render`."""
        from vllm.inputs.engine import tokens_input

        text = self._encoder.encode(turns)
        images = [image for turn in turns for image in turn.images]
        reuse = options.get("reuse_prefix")
        if images:
            max_crops = options.get("max_crops") or self._max_crops
            return self._with_images(images, text, max_crops, reuse)
        for turn in turns:
            if turn.video is not None:
                return self._with_video(turn.video, text, reuse)
        ids = [self._encoder.bos, *text]
        check_length(len(ids), self._max_model_len)
        return Rendered(tokens_input(ids), len(ids), 0, ids, self._encoder.answer_prefix)

    def encode(self, answer: str) -> list[int]:
        """See `Renderer.encode`."""
        return self._encoder.plain(self._encoder.answer_prefix + answer)

    def _with_images(
        self, images: Sequence[Any], text: list[int], max_crops: int, reuse: object
    ) -> Rendered:
        from molmo_edge.models.molmo2.inputs import engine_input, image_visuals

        # Before the pixels are touched: a prompt that does not fit costs nothing.
        geometry = self._processing.geometry
        tilings = [geometry.tiling(image.height, image.width, max_crops) for image in images]
        pieces: list[list[int]] = []
        for number, tiling in enumerate(tilings, start=1):
            title = self._encoder.text(f"Image {number}") if len(tilings) > 1 else []
            pieces.append([*title, *image_tokens(tiling, self._ids, self._processing).tolist()])
        ids = self._prompt(pieces, text, "images")
        pixels = [np.asarray(image) for image in images]
        visuals = image_visuals(pixels, tilings)
        digest = self._hash(reuse, pixels, max_crops)
        prompt, n_tokens = engine_input(ids, self._ids, "image", visuals, digest)
        return Rendered(prompt, len(ids), n_tokens, ids, self._encoder.answer_prefix)

    def _with_video(self, clip: Any, text: list[int], reuse: object) -> Rendered:
        from molmo_edge.models.molmo2.inputs import engine_input, frame_visuals

        frame = frame_tokens(self._ids, self._processing).tolist()
        pieces = []
        for number, seconds in enumerate(clip.times):
            time = self._encoder.text(f"{' ' if number else ''}{seconds:.1f} ")
            pieces.append([*time, *frame])
        ids = self._prompt(pieces, text, "frames")
        visuals = frame_visuals(clip.frames, self._processing.geometry)
        digest = self._hash(reuse, clip.frames, "video")
        prompt, n_tokens = engine_input(ids, self._ids, "video", visuals, digest)
        return Rendered(prompt, len(ids), n_tokens, ids, self._encoder.answer_prefix)

    def _prompt(self, pieces: Sequence[list[int]], text: list[int], what: str) -> list[int]:
        """BOS, images or frames, and text. Raises PromptTooLongError if they do not fit."""
        room = self._max_model_len - 1 - len(text) - 1  # one token of answer
        ends = np.cumsum([len(piece) for piece in pieces])
        if ends[-1] > room:
            raise PromptTooLongError(
                f"{int((ends <= room).sum())} of the {len(pieces)} {what} fit beside the text: "
                f"max_model_len is {self._max_model_len}, and the prompt has "
                f"{1 + int(ends[-1]) + len(text)} tokens. Use fewer, a lower max_crops, or raise "
                "max_model_len."
            )
        return [self._encoder.bos, *(i for piece in pieces for i in piece), *text]
