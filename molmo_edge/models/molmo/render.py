"""Molmo requests to vLLM engine inputs, in the caller's thread.

vLLM's own renderer would do the same by way of a prompt-update search, and with torch held to one
thread; here positions are known beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from vllm.inputs.engine import mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

from molmo_edge.errors import ImageError, PromptTooLongError
from molmo_edge.interface import Rendered, Turn
from molmo_edge.models.molmo.image_processor import ImageInputs, MolmoImageProcessor
from molmo_edge.models.molmo.layout import ImageTokenIds
from molmo_edge.models.molmo.processor import ONE_IMAGE
from molmo_edge.models.molmo.prompts import PromptEncoder


@contextmanager
def _no_thread_pool() -> Iterator[None]:
    """Keeps torch from starting threads for the calling thread.

    Each thread that computes gets an OpenMP pool of its own, for good, and once there are more
    pool threads than cores they stop waiting actively: on a CPU that halves the engine's speed.
    """
    # Not torch.set_num_threads, which vLLM's CPU backend replaces by a warning.
    before = torch.get_num_threads()
    torch._C.set_num_threads(1)
    try:
        yield
    finally:
        torch._C.set_num_threads(before)


class MolmoRenderer:
    """Renders for one engine.

    Args:
        llm: the `vllm.LLM`; read once here, so that `render` touches nothing the engine writes.
        image_processor: with the engine's `max_crops` and `resize`.
    """

    def __init__(self, llm: Any, image_processor: MolmoImageProcessor) -> None:
        config = llm.llm_engine.vllm_config
        tokenizer = llm.get_tokenizer()
        self._max_model_len = int(config.model_config.max_model_len)
        self._dtype = config.model_config.dtype
        self._encoder = PromptEncoder(tokenizer, self._max_model_len)
        self._ids = ImageTokenIds.from_vocab(tokenizer.get_vocab())
        self._image_processor = image_processor
        # Equal pictures share encoder and prefix cache by hash; without caches a number will do.
        self._hashing = bool(config.cache_config.enable_prefix_caching)
        self._number = itertools.count()

    def render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Rendered:
        """See `Engine.render`."""
        text_ids = [*self._encoder.encode(turns), *options.get("answer", ())]
        images = [image for turn in turns for image in turn.images]
        if len(images) > 1:
            raise ImageError(ONE_IMAGE)
        if images and not turns[0].images:
            raise ImageError("Molmo 1 sees its image before all text: give it in the first turn.")
        if not images:
            ids = [self._encoder.bos, *text_ids]
            self._check_length(len(ids), 0)
            return Rendered(tokens_input(ids), len(ids), 0, ids, answer_prefix=" ")
        processor = self._image_processor.with_options(max_crops=options.get("max_crops"))
        # Once: Pillow copies all pixels each time it is asked for an array.
        pixels = np.asarray(images[0])
        layout = processor.layout(pixels)
        # Before the pixels are touched: a prompt that does not fit costs nothing.
        total = 1 + layout.n_tokens + len(text_ids)
        self._check_length(total, layout.n_tokens)
        inputs = processor.inputs(pixels)
        ids = [self._encoder.bos, *layout.tokens(self._ids).tolist(), *text_ids]
        prompt = mm_input(
            prompt_token_ids=ids,
            mm_kwargs=self._tensors(inputs),
            mm_hashes={"image": [self._hash(pixels, processor)]},
            mm_placeholders={"image": [self._place(inputs)]},
        )
        return Rendered(prompt, total, layout.n_tokens, ids, answer_prefix=" ")

    def _check_length(self, total: int, image_tokens: int) -> None:
        if total >= self._max_model_len:
            image = f", {image_tokens} of them for the image," if image_tokens else ""
            raise PromptTooLongError(
                f"The prompt has {total} tokens{image} and leaves no room to answer: max_model_len "
                f"is {self._max_model_len}. Shorten the text, lower max_crops, or raise "
                "max_model_len."
            )

    def _tensors(self, inputs: ImageInputs) -> Any:
        crops = torch.tensor([len(inputs.images)])
        by_crop = MultiModalFieldConfig.flat_from_sizes("image", crops)
        with _no_thread_pool():
            images = inputs.images.to(self._dtype)
        data = {
            "images": images,
            "image_masks": inputs.image_masks.to(self._dtype),
            # Only the order of positions counts here, not where the picture stands.
            "image_input_idx": torch.from_numpy(inputs.layout.input_idx),
            "num_crops": crops,
            "img_patch_id": torch.tensor(self._ids.patch),
        }
        fields = {
            "images": by_crop,
            "image_masks": by_crop,
            "image_input_idx": by_crop,
            "num_crops": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "img_patch_id": MultiModalFieldConfig.shared("image", 1, keep_on_cpu=True),
        }
        return MultiModalKwargsItems.from_hf_inputs(data, fields)

    def _place(self, inputs: ImageInputs) -> PlaceholderRange:
        tokens = torch.from_numpy(inputs.layout.tokens(self._ids))
        return PlaceholderRange(
            offset=1, length=len(tokens), is_embed=tokens == self._ids.patch
        )

    def _hash(self, pixels: npt.NDArray[np.uint8], processor: MolmoImageProcessor) -> str:
        if not self._hashing:
            return f"image-{next(self._number)}"
        # Pixels are RGB here, so mode and palette cannot make two pictures collide.
        # Cryptographic, as another's picture must not be found by design; BLAKE2b takes 6 × longer.
        digest = blake3(pixels.data)
        digest.update(repr((pixels.shape, processor.max_crops, processor.resize)).encode())
        return digest.hexdigest()
