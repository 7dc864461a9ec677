"""AllenAI's Molmo 1 as a model family: registration with vLLM, and turns to engine input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_edge.checkpoint_files import processor_settings
from molmo_edge.errors import ImageError, ModelError
from molmo_edge.interface import ImageAttention, Rendered, Renderer, Resize, Turn
from molmo_edge.models.checkpoint import check_files
from molmo_edge.models.hashing import ImageHasher
from molmo_edge.models.molmo.config import check_layout
from molmo_edge.models.molmo.prompts import ONE_IMAGE, ImageTokenIds, PromptEncoder
from molmo_edge.models.molmo.tiling import DEFAULT_MAX_CROPS, MOST_CROPS, tiling_for
from molmo_edge.requests import check_length

if TYPE_CHECKING:
    from molmo_edge.models.molmo.image_processor import ImageInputs, MolmoImageProcessor

ARCHITECTURE = "MolmoForCausalLM"
# vLLM's own model under another name, for `molmo-edge verify --stock`.
STOCK_ARCHITECTURE = "StockMolmoForCausalLM"
# The answer's leading space belongs to the prompt format, " Assistant: …".
ANSWER_PREFIX = " "


class Molmo:
    """AllenAI's Molmo 1 (7B-D, 7B-O, 72B)."""

    name = "molmo"
    verbs = frozenset({"query", "chat", "choose", "caption", "point", "count"})
    prompts: Mapping[str, str] = {}
    # Molmo 1 was trained on single images.
    max_images = 1
    crops = True
    image_attention: ImageAttention = "causal"
    unquantized: tuple[str, ...] = ("vision_backbone.*",)

    def check(self, config: Mapping[str, Any], folder: Path, load_format: str) -> None:
        check_layout(config)
        self.default_crops(folder)
        check_files(config, folder, load_format)

    def default_crops(self, folder: Path) -> int:
        crops = processor_settings(folder, "image").get("max_crops", DEFAULT_MAX_CROPS)
        if crops not in range(1, MOST_CROPS + 1):
            raise ModelError(f"preprocessor_config.json: max_crops must be 1 to {MOST_CROPS}.")
        return int(crops)

    def frame_sampling(self, folder: Path) -> None:
        return None

    def engine_args(self, max_crops: int, resize: Resize, max_frames: int) -> dict[str, Any]:
        return {
            "mm_processor_kwargs": {"max_crops": max_crops, "resize": resize},
            "limit_mm_per_prompt": {"image": self.max_images},
        }

    def prepare(self) -> None:
        from vllm import ModelRegistry
        from vllm.plugins import load_general_plugins

        load_general_plugins()  # runs once per process, and registers the name: not after the class
        register()
        # The class itself: for a name, vLLM starts one more process to inspect it.
        from molmo_edge.models.molmo.vllm_model import MolmoForCausalLM

        ModelRegistry.register_model(ARCHITECTURE, MolmoForCausalLM)

    def renderer(self, engine: Any, max_crops: int, resize: Resize) -> Renderer:
        from molmo_edge.models.molmo.image_processor import processor_of

        config = engine.model_config.hf_image_processor_config
        return MolmoRenderer(engine, processor_of(config, max_crops=max_crops, resize=resize))


def register() -> None:
    """Make vLLM and transformers read Molmo 1 with this package's classes; may repeat."""
    from vllm import ModelRegistry

    from molmo_edge.models.molmo import hf

    hf.register()
    ModelRegistry.register_model(ARCHITECTURE, f"molmo_edge.models.molmo.vllm_model:{ARCHITECTURE}")
    ModelRegistry.register_model(
        STOCK_ARCHITECTURE, f"vllm.model_executor.models.molmo:{ARCHITECTURE}"
    )


class MolmoRenderer:
    """Renders for one engine, which is read only here.

    vLLM's own renderer would search the prompt for the image's place; here it is known.
    """

    def __init__(self, engine: Any, image_processor: MolmoImageProcessor) -> None:
        tokenizer = engine.get_tokenizer()
        self._max_model_len = int(engine.model_config.max_model_len)
        self._encoder = PromptEncoder(tokenizer, self._max_model_len)
        self._ids = ImageTokenIds.from_vocab(tokenizer.get_vocab())
        self._image_processor = image_processor
        self._hash = ImageHasher()

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        """See `Engine.render`."""
        from vllm.inputs.engine import mm_input, tokens_input

        text_ids = self._encoder.encode(turns)
        images = [image for turn in turns for image in turn.images]
        if len(images) > 1:
            raise ImageError(ONE_IMAGE)
        if images and not turns[0].images:
            raise ImageError("Molmo 1 sees its image before all text: give it in the first turn.")
        if not images:
            ids = [self._encoder.bos, *text_ids]
            check_length(len(ids), self._max_model_len)
            return Rendered(tokens_input(ids), len(ids), 0, ids, ANSWER_PREFIX)
        # Once: Pillow copies all pixels each time it is asked for an array.
        pixels = np.asarray(images[0])
        processor = self._image_processor
        if (max_crops := options.get("max_crops")) is not None:
            processor = replace(processor, max_crops=max_crops)
        # Before the pixels are touched: a prompt that does not fit costs nothing.
        tiling = tiling_for(*pixels.shape[:2], processor.max_crops)
        total = 1 + tiling.n_tokens + len(text_ids)
        check_length(total, self._max_model_len, 1)
        ids = [self._encoder.bos, *tiling.tokens(self._ids).tolist(), *text_ids]
        tensors, place = self._tensors(processor.inputs(pixels))
        digest = self._hash(
            options.get("reuse_prefix"), [pixels], processor.max_crops, processor.resize
        )
        prompt = mm_input(
            prompt_token_ids=ids,
            mm_kwargs=tensors,
            mm_hashes={"image": [digest]},
            mm_placeholders={"image": [place]},
        )
        return Rendered(prompt, total, tiling.n_tokens, ids, ANSWER_PREFIX)

    def encode(self, answer: str) -> list[int]:
        """See `Renderer.encode`."""
        return self._encoder.plain(ANSWER_PREFIX + answer)

    def _tensors(self, inputs: ImageInputs) -> tuple[Any, Any]:
        """vLLM's keyword items and placeholder range for one image."""
        import torch
        from vllm.multimodal.inputs import (
            MultiModalFieldConfig,
            MultiModalKwargsItems,
            PlaceholderRange,
        )

        data = inputs.for_vllm(self._ids.patch)
        by_crop = MultiModalFieldConfig.flat_from_sizes("image", data["num_crops"])
        fields = {
            "images": by_crop,
            "image_masks": by_crop,
            "image_input_idx": by_crop,
            "num_crops": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "img_patch_id": MultiModalFieldConfig.shared("image", 1, keep_on_cpu=True),
        }
        tokens = torch.from_numpy(inputs.tiling.tokens(self._ids))
        place = PlaceholderRange(offset=1, length=len(tokens), is_embed=tokens == self._ids.patch)
        return MultiModalKwargsItems.from_hf_inputs(data, fields), place
