"""Text and picture to model inputs: Molmo 1's processor for transformers 5, without remote code.

It offers the reference's `process` (what AllenAI's examples call) and the two hooks that vLLM's
own Molmo code calls (`get_tokens_input`, `process(tokens=…)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from molmo_edge.errors import ImageError
from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
from molmo_edge.models.molmo.layout import ImageTokenIds

ONE_IMAGE = (
    "Molmo 1 takes one image a request: it was trained on single images, and a second one would "
    "get the positions of the first."
)


class MolmoProcessor(ProcessorMixin):  # type: ignore[misc]
    """Pairs a `MolmoImageProcessor` with the checkpoint's tokenizer."""

    def __init__(
        self,
        image_processor: MolmoImageProcessor | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # The hub's processor_config.json holds nothing that this class needs.
        super().__init__(image_processor or MolmoImageProcessor(), tokenizer)
        self.image_token_ids = ImageTokenIds.from_vocab(tokenizer.get_vocab())

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Both arguments are checked by use: the base class would want transformers' own types."""
        return type(argument)

    @property
    def bos_token_id(self) -> int:
        """Id in front of every sequence: the tokenizer's BOS, or its EOS where it has none."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

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
        """Model inputs of one sequence, unbatched as in the reference.

        Args:
            text: one user turn; or give `tokens`, used as they are.
            images: None, or one picture (RGB PIL, or H×W×3 uint8), or a list of one.
            max_crops, resize: override the image processor's for this call.

        Returns:
            ``input_ids`` (n,) int64 with BOS in front and the image before the text; with a picture
            also ``images`` (c, 576, 588) float32, ``image_masks`` (c, 576) float32 and
            ``image_input_idx`` (c, 144) int32, positions in `input_ids`, -100 where dropped.

        Raises:
            ImageError: more than one image, or not a picture.
        """
        if tokens is None:
            tokens = self.get_tokens_input(
                text or "",
                kwargs.get("message_format", "role"),
                kwargs.get("always_start_with_space", True),
            )
        ids = [np.array([self.bos_token_id], dtype=np.int64)]
        out: dict[str, torch.Tensor] = {}
        if images is not None:
            if isinstance(images, list | tuple):
                if len(images) != 1:
                    raise ImageError(ONE_IMAGE)
                images = images[0]
            done = self.image_processor.with_options(max_crops=max_crops, resize=resize).inputs(
                images
            )
            ids.append(done.layout.tokens(self.image_token_ids))
            idx = done.layout.input_idx
            out = {
                "images": done.images,
                # Behind the BOS, so one later.
                "image_input_idx": torch.from_numpy(np.where(idx < 0, idx, idx + 1)),
                "image_masks": done.image_masks,
            }
        ids.append(np.asarray(tokens, dtype=np.int64))
        return BatchFeature({"input_ids": torch.from_numpy(np.concatenate(ids)), **out})

    __call__ = process
