"""The reference implementation: Molmo 1 in plain float32 torch, to be read in one sitting.

Written from the architecture as published (Molmo-7B-D-0924, -7B-O-0924, -72B-0924), one image and
one sequence at a time, for clarity rather than speed. It reads the hub's tensor names. It shares no
computing code with vLLM, transformers or molmo_edge's own model and processor, because the engine's
answers are compared with its answers. It knows nothing about tokenizers.

The order of computation is image to features and features into the sequence (this file), then
sequence to logits and logits to tokens (`common`).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from molmo_edge.checkpoint_files import read_config, tensors
from molmo_edge.devices.tensors import POOL, VISION, VIT, VIT_BLOCKS, tensor_shapes
from molmo_edge.errors import InputError
from molmo_edge.reference.checkpoint import (
    TextConfig,
    count_blocks,
    read_weights,
    text_config,
    tower_of,
)
from molmo_edge.reference.common import ReferenceModel, TokenIds
from molmo_edge.reference.molmo_inputs import ReferenceInputs

# Checkpoints do not state these.
VIT_EPS = 1e-5  # layer norms of the vision tower
VIT_HEAD = 64  # head size of the vision tower and of the pooling


class ReferenceMolmo(ReferenceModel[ReferenceInputs]):
    """A Molmo 1 checkpoint, float32, on the CPU. Make one with `load`."""

    def __init__(self, config: TextConfig, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(config, weights)
        self._vit_blocks = count_blocks(weights, VIT_BLOCKS)

    @classmethod
    def load(cls, directory: Path) -> ReferenceMolmo:
        """Read `config.json` and `*.safetensors` of a directory.

        float32 tensors stay mapped to their file: do not rewrite it while the model is in use.
        Raises ModelError when a file or tensor is missing, broken or of another layout.
        """
        config = read_config(directory)
        text = text_config(config)
        tower = tower_of({tensor.name: tensor.shape for tensor in tensors(directory)})
        return cls(text, read_weights(directory, tensor_shapes(config, tower)))

    # Image to features

    def _tower(self, crop: torch.Tensor) -> torch.Tensor:
        """One crop, (576, 588) pixels, to (576, 2 * tower width)."""
        patches = self._linear(crop, VIT + "patch_embedding")
        x = torch.cat([self._w[VIT + "class_embedding"][None], patches])
        x = self._layer_norm(x + self._w[VIT + "positional_embedding"], VIT + "pre_ln", VIT_EPS)
        states = []
        for i in range(self._vit_blocks):
            block = f"{VIT_BLOCKS}{i}."
            h = self._layer_norm(x, block + "attention_norm", VIT_EPS)
            x = x + self._attend_all(h, h, block + "attention.", VIT_HEAD)
            h = self._layer_norm(x, block + "ffn_norm", VIT_EPS)
            h = self._linear(h, block + "feed_forward.w1")
            x = x + self._linear(h * torch.sigmoid(1.702 * h), block + "feed_forward.w2")
            states.append(x)
        return torch.cat([states[-2], states[-9]], dim=-1)[1:]  # without the class token

    def _pool(self, features: torch.Tensor) -> torch.Tensor:
        """(576, c) features of a crop to (144, pooled width): one per 2 x 2 window."""
        windows = features.reshape(12, 2, 12, 2, -1).permute(0, 2, 1, 3, 4).reshape(144, 4, -1)
        return self._attend_all(windows.mean(1, keepdim=True), windows, POOL, VIT_HEAD)[:, 0]

    def image_features(self, inputs: ReferenceInputs) -> torch.Tensor:
        """(1 + crops, 144, hidden) float32."""
        out = []
        padding = self._w[VISION + "pad_embed"]
        crops, masks = torch.tensor(inputs.images), torch.tensor(inputs.image_masks)
        for crop, mask in zip(crops, masks, strict=True):
            all_pad, part_pad = mask == 0, (mask < 1) & (mask != 0)
            x = self._tower(crop)
            x = x + padding[0] * all_pad[:, None] + padding[1] * part_pad[:, None]
            out.append(self._project(self._pool(x)))
        return torch.stack(out)

    # Features into the sequence

    def _embed(self, input_ids: TokenIds, inputs: ReferenceInputs | None) -> torch.Tensor:
        """(n, hidden): features are added to the embeddings of their `<im_patch>` tokens.

        Raises InputError when the sequence is too short for the image.
        """
        x = F.embedding(torch.tensor(input_ids), self._embedding)
        if inputs is None:
            return x
        place = torch.tensor(inputs.image_input_idx).flatten().long()
        if int(place.max()) >= len(x):
            raise InputError(
                f"The image's features go up to position {int(place.max())}, but the sequence "
                f"has {len(x)} tokens. Build it from BOS, the image's tokens, then the text."
            )
        features = self.image_features(inputs).flatten(0, 1)
        return x.index_add(0, place[place >= 0], features[place >= 0])
