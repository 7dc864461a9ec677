"""Molmo 1's configuration and processor for transformers 5, without remote code."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from molmo_edge.errors import ImageError, ModelError
from molmo_edge.models.molmo.config import check_layout
from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
from molmo_edge.models.molmo.prompts import ONE_IMAGE, ImageTokenIds, bos_id

# Molmo-7B-D-0924's; `intermediate_size` counts both halves of `ff_proj`.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 152064,
    "embedding_size": None,
    "hidden_size": 3584,
    "intermediate_size": 37888,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "use_cache": True,
    "layer_norm_eps": 1e-6,
    "clip_qkv": None,
    "qkv_bias": True,
    "weight_tying": False,
    "use_position_ids": True,
    "attention_layer_norm": False,
    "norm_after": False,
    "layer_norm_type": "rms",
}


class MolmoConfig(PretrainedConfig):  # type: ignore[misc]
    """The hub's `config.json` as it is. Raises ModelError for an unsupported layout."""

    model_type = "molmo"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # these classes are used whatever code the checkpoint names
        values = {**_DEFAULTS, **{k: v for k, v in kwargs.items() if k in _DEFAULTS}}
        check_layout({"model_type": "molmo", **kwargs, **values})
        if values["embedding_size"] is None:
            values["embedding_size"] = values["vocab_size"]
        # null on the hub (7B-O): as many key/value heads as heads.
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        for name, value in values.items():
            kwargs.pop(name, None)
            setattr(self, name, value)
        theta = kwargs.pop("rope_theta", 1_000_000.0)
        rope = kwargs.pop("rope_parameters", None)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(
            rope_parameters=rope or {"rope_type": "default", "rope_theta": theta}, **kwargs
        )


class MolmoProcessor(ProcessorMixin):  # type: ignore[misc]
    """Pairs a `MolmoImageProcessor` with the checkpoint's tokenizer.

    `process` is what AllenAI's examples call; vLLM's own Molmo code also calls `get_tokens_input`
    and `process(tokens=…)`.
    """

    def __init__(
        self,
        image_processor: MolmoImageProcessor | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # The hub's processor_config.json contains nothing that this class needs.
        super().__init__(image_processor or MolmoImageProcessor(), tokenizer)
        self.image_token_ids = ImageTokenIds.from_vocab(tokenizer.get_vocab())
        self.bos_token_id = bos_id(tokenizer)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept this package's image processor, where the base class wants transformers' own."""
        return type(argument)

    def get_tokens_input(
        self,
        prompt: str,
        message_format: str | None = "role",
        always_start_with_space: bool = True,
    ) -> list[int]:
        """Token ids of one user turn, without BOS; ``message_format="none"`` adds no roles."""
        if message_format == "role":
            prompt = f"User: {prompt} Assistant:"
        elif message_format not in (None, "none"):
            raise ValueError("message_format must be 'role' or 'none'.")
        if always_start_with_space:
            prompt = f" {prompt}"
        return list(self.tokenizer.encode(prompt, add_special_tokens=False))

    def process(
        self,
        text: str | None = None,
        images: Any = None,
        *,
        tokens: Sequence[int] | None = None,
        max_crops: int | None = None,
        resize: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Convert one sequence to model inputs, unbatched as in the reference.

        Args:
            text: one user turn; or give `tokens`, used as they are.
            images: None, or one image (RGB PIL, or H×W×3 uint8), or a list of one.
            max_crops, resize: override the image processor's for this call.

        Returns:
            ``input_ids`` (n,) int64: BOS, the image, the text; with an image also ``images``
            (c, 576, 588) float32, ``image_masks`` (c, 576) float32 and ``image_input_idx``
            (c, 144) int32, positions in `input_ids`, -100 where a feature is dropped.

        Raises:
            ImageError: more than one image, or not an image.
        """
        if tokens is None:
            tokens = self.get_tokens_input(text or "", kwargs.get("message_format", "role"))
        ids = [np.array([self.bos_token_id], dtype=np.int64)]
        out: dict[str, torch.Tensor] = {}
        if images is not None:
            if isinstance(images, list | tuple):
                if len(images) != 1:
                    raise ImageError(ONE_IMAGE)
                images = images[0]
            processor = self.image_processor.with_options(max_crops=max_crops, resize=resize)
            # vLLM calls this before its CPU backend starts, which fails once numba is imported
            # (models/vllm_workarounds.py).
            inputs = processor.inputs(images, compiled="numba" in sys.modules)
            ids.append(inputs.tiling.tokens(self.image_token_ids))
            index = inputs.tiling.input_idx
            out = {
                "images": inputs.images,
                "image_masks": inputs.image_masks,
                # One later, as BOS stands before the image.
                "image_input_idx": torch.from_numpy(np.where(index < 0, index, index + 1)),
            }
        ids.append(np.asarray(tokens, dtype=np.int64))
        return BatchFeature({"input_ids": torch.from_numpy(np.concatenate(ids)), **out})

    __call__ = process


def register() -> None:
    """Make transformers' Auto classes read Molmo 1's files with these classes."""
    AutoConfig.register("molmo", MolmoConfig, exist_ok=True)
    AutoImageProcessor.register(
        MolmoConfig, image_processor_classes={"pil": MolmoImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(MolmoConfig, MolmoProcessor, exist_ok=True)


def load_tokenizer(directory: Path) -> Any:
    """Read the tokenizer of a Molmo 1 checkpoint. Raises ModelError when there is none."""
    register()
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError) as exc:
        raise ModelError(f"'{directory}' has no readable tokenizer. Download it again.") from exc
