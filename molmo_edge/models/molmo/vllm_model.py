"""vLLM's Molmo, corrected; registered by the plugin under the same architecture name.

What stock vLLM computes differently from AllenAI's reference, and what corrects it:

1. image features *replace* the `<im_patch>` embedding instead of being added to it
   (`_process_image_input`);
2. the 2×2 pooling is cross-attention with one query and four keys, which vLLM's CUDA vision
   backends cut by the query's length (`PoolingAttention`);
3. a prompt that is already token ids is decoded, re-encoded and given a second BOS
   (`_postprocess_prompt`);
4. `max_crops` reaches the pixels but not the token count (`MolmoInfo`);

5. a quantised LM head is not recognised (`models/head.py`).

NaN is marked (`models/nan.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models import molmo as stock
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, ImageSize, MultiModalDataItems
from vllm.multimodal.processing import (
    PromptIndexTargets,
    PromptInsertion,
    PromptUpdate,
    PromptUpdateDetails,
)

from molmo_edge.devices.tensors import TEXT
from molmo_edge.models.head import quantised_head
from molmo_edge.models.molmo.image_processor import MolmoImageProcessor, processor_of
from molmo_edge.models.molmo.prompts import ImageTokenIds
from molmo_edge.models.molmo.tiling import largest_tiling, tiling_for
from molmo_edge.models.nan import checked_logits, ignore_bitmask_warning
from molmo_edge.models.processor_options import processor_options
from molmo_edge.models.prompts import bos_id
from molmo_edge.models.vllm_workarounds import adapt_processor

# What a request or the engine may set through `mm_processor_kwargs`.
_OPTIONS = frozenset({"max_crops", "resize"})


class MolmoInfo(stock.MolmoProcessingInfo):  # type: ignore[misc]
    """Answers vLLM's questions about tokens and sizes with our processor's own geometry."""

    @cached_property
    def ids(self) -> ImageTokenIds:
        return ImageTokenIds.from_vocab(self.get_tokenizer().get_vocab())

    def image_processor(self, kwargs: Mapping[str, object]) -> MolmoImageProcessor:
        """The image processor with the engine's and one request's `mm_processor_kwargs`."""
        options = processor_options(self, kwargs, _OPTIONS, "Molmo 1")
        return processor_of(self.ctx.get_hf_image_processor_config(), **options)

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {"text_kwargs": set(), "images_kwargs": set(_OPTIONS)}

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def get_image_size_with_most_features(self) -> ImageSize:
        height, width = largest_tiling(self.image_processor({}).max_crops).canvas_px
        return ImageSize(width=width, height=height)


class MolmoInputs(stock.MolmoMultiModalProcessor):  # type: ignore[misc]
    """Turns a request's image into tensors and its prompt into token ids."""

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        tokenizer = self.info.get_tokenizer()
        bos = bos_id(tokenizer)
        if prompt[:1] == [bos]:
            return prompt
        # A string that vLLM tokenised: the reference starts it with BOS and a space.
        text = " " + tokenizer.decode(prompt)
        return [bos, *tokenizer.encode(text, add_special_tokens=False)]

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        [image] = hf_data["images"]
        # vLLM calls this before its CPU backend starts, which fails once numba is imported
        # (models/vllm_workarounds.py).
        inputs = self.info.image_processor(hf_kwargs).inputs(image, compiled=False)
        return BatchFeature(inputs.for_vllm(self.info.ids.patch))

    def _postprocess_hf_mm_data(
        self,
        hf_data: Mapping[str, object],
        hf_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        return processed_data

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        ids, bos = self.info.ids, bos_id(self.info.get_tokenizer())
        max_crops = self.info.image_processor(hf_processor_mm_kwargs).max_crops

        def image_tokens(item_idx: int) -> PromptUpdateDetails:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(item_idx)
            tokens = tiling_for(size.height, size.width, max_crops).tokens(ids).tolist()
            return PromptUpdateDetails.select_token_id(tokens, embed_token_id=ids.patch)

        return [
            PromptInsertion(
                modality="image", target=PromptIndexTargets.prefix([bos]), insertion=image_tokens
            )
        ]


class PoolingAttention(nn.Module):  # type: ignore[misc]
    """Attention of a few queries over a few keys, in float32 as the reference does it.

    Too small to need a fused kernel, and right whatever the vision backend assumes about equal
    lengths.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query (b, q, heads * head_dim), key and value (b, k, heads * head_dim) → like query."""

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.float().view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

        out = F.scaled_dot_product_attention(heads(query), heads(key), heads(value))
        return out.transpose(1, 2).reshape(query.shape).to(query.dtype)


@MULTIMODAL_REGISTRY.register_processor(
    adapt_processor(MolmoInputs), info=MolmoInfo, dummy_inputs=stock.MolmoDummyInputsBuilder
)
class MolmoForCausalLM(stock.MolmoForCausalLM):  # type: ignore[misc]
    """vLLM's Molmo with the reference's merge and pooling."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        ignore_bitmask_warning()
        config = self.config
        vocabulary = config.embedding_size or config.vocab_size
        head = quantised_head(vllm_config, vocabulary, config.hidden_size, TEXT + "ff_out")
        if head is not None:
            self.lm_head = head
        pooling = self.vision_backbone.image_pooling_2d
        self.set_submodule(
            "vision_backbone.image_pooling_2d.attn",
            PoolingAttention(pooling.num_heads, pooling.head_dim),
        )

    def _process_image_input(self, image_input: stock.MolmoImageInputs) -> list[torch.Tensor]:
        features = super()._process_image_input(image_input)
        patch = torch.tensor([self.img_patch_id], device=features[0].device)
        embedding = self.model.embed_tokens(patch)
        return [feature + embedding for feature in features]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return checked_logits(super().compute_logits(hidden_states), self.config)
