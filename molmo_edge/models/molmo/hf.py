"""Molmo 1's configuration and processor for transformers 5, without remote code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.processing_utils import ProcessorMixin

from molmo_edge.devices.tensors import MOLMO_DEFAULTS
from molmo_edge.errors import ImageError, ModelError
from molmo_edge.models.molmo.config import check_layout
from molmo_edge.models.molmo.image_processor import MolmoImageProcessor, processor_of
from molmo_edge.models.molmo.prompts import ONE_IMAGE, ImageTokenIds
from molmo_edge.models.prompts import bos_id, template_with_bos


class MolmoConfig(PretrainedConfig):  # type: ignore[misc]
    """The hub's `config.json` as it is. Raises ModelError for an unsupported layout."""

    model_type = "molmo"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # these classes are used whatever code the checkpoint names
        values = {**MOLMO_DEFAULTS, **kwargs}
        check_layout({"model_type": "molmo", **values})
        if values["embedding_size"] is None:
            values["embedding_size"] = values["vocab_size"]
        # null on the hub (7B-O): as many key/value heads as heads.
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        theta = values.pop("rope_theta")
        rope = {"rope_type": "default", "rope_theta": theta}
        values["rope_parameters"] = values.get("rope_parameters") or rope
        for name in MOLMO_DEFAULTS.keys() & values.keys():
            setattr(self, name, values.pop(name))
        super().__init__(tie_word_embeddings=self.tie_word_embeddings, **values)


class MolmoProcessor(ProcessorMixin):  # type: ignore[misc]
    """AllenAI's `process`, which vLLM's own Molmo calls, and the chat template of vLLM's server.

    molmo_edge's model does without it.
    """

    def __init__(self, image_processor: MolmoImageProcessor, tokenizer: Any) -> None:
        bos = tokenizer.convert_ids_to_tokens(bos_id(tokenizer))
        template = template_with_bos(tokenizer.chat_template, bos, " ")
        super().__init__(image_processor, tokenizer, chat_template=template)
        self.image_token_ids = ImageTokenIds.from_vocab(tokenizer.get_vocab())

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> MolmoProcessor:
        """Read the processor of a checkpoint; keyword arguments of transformers are ignored."""
        return cls(processor_of(get_image_processor_config(name)), load_tokenizer(name))

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept this package's image processor, where the base class wants transformers' own."""
        return type(argument)

    def get_tokens_input(self, prompt: str, message_format: str = "role", **_: Any) -> list[int]:
        """Token ids of one user turn, without BOS; ``message_format="none"`` adds no roles."""
        text = f" User: {prompt} Assistant:" if message_format == "role" else f" {prompt}"
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def process(
        self, text: str = "", images: Any = (), *, tokens: Sequence[int] | None = None, **_: Any
    ) -> BatchFeature:
        """Convert one sequence to model inputs, unbatched as in the reference.

        Args:
            text: one user turn; or give `tokens`, used as they are.
            images: none or one, RGB PIL image or H×W×3 uint8.

        Returns ``input_ids`` (n,) int64: BOS, the image, the text; with an image also ``images``
        and ``image_masks`` as in `ImageInputs`, and ``image_input_idx`` (c, 144) int32, positions
        in `input_ids`, -100 where a feature is dropped. Raises ImageError.
        """
        ids = [bos_id(self.tokenizer)]
        out: dict[str, torch.Tensor] = {}
        if len(images) > 1:
            raise ImageError(ONE_IMAGE)
        for image in images:
            inputs = self.image_processor.inputs(image, compiled=False)
            ids += inputs.tiling.tokens(self.image_token_ids).tolist()
            index = torch.from_numpy(inputs.tiling.input_idx)
            out = {
                "images": inputs.images,
                "image_masks": inputs.image_masks,
                # One later, as BOS stands before the image.
                "image_input_idx": torch.where(index < 0, index, index + 1),
            }
        ids += self.get_tokens_input(text) if tokens is None else tokens
        return BatchFeature({"input_ids": torch.tensor(ids), **out})


def register() -> None:
    """Make transformers' Auto classes read Molmo 1's files with these classes."""
    AutoConfig.register("molmo", MolmoConfig, exist_ok=True)
    AutoProcessor.register(MolmoConfig, MolmoProcessor, exist_ok=True)


def load_tokenizer(directory: Path | str) -> Any:
    """Read the tokenizer of a Molmo 1 checkpoint. Raises ModelError when there is none."""
    register()
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError) as exc:
        raise ModelError(f"'{directory}' has no readable tokenizer. Download it again.") from exc
