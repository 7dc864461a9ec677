"""The reference implementation: Molmo 2 in plain float32 torch, to be read in one sitting.

Written from the architecture as published with AllenAI's molmo2 code (Molmo2-4B, -8B, -O-7B), one
crop and one sequence at a time. It reads the hub's tensor names and shares no computing code with
vLLM, transformers or molmo_edge's own model and processor, because the engine's answers are
compared with its answers. It knows nothing about tokenizers.

The order of computation is images to features and features into the sequence (this file), then
sequence to logits and logits to tokens (`common`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from molmo_edge.checkpoint_files import read_config
from molmo_edge.devices.tensors import (
    ADAPTER_DEFAULTS,
    POOL,
    TEXT_DEFAULTS,
    VIT,
    VIT_BLOCKS,
    VIT_DEFAULTS,
    molmo2_tensor_shapes,
)
from molmo_edge.errors import InputError
from molmo_edge.models.molmo2.config import ImageIds, check_layout
from molmo_edge.reference.checkpoint import TextConfig, read_weights
from molmo_edge.reference.common import ReferenceModel, TokenIds
from molmo_edge.reference.molmo2_inputs import Molmo2Inputs


def text_config(text: Mapping[str, Any]) -> TextConfig:
    """Return the language model that a `text_config` describes."""
    return TextConfig(
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head=text["head_dim"],
        rope_theta=float(text["rope_theta"]),
        eps=float(text["layer_norm_eps"]),
        qk_norm="head" if text["qk_norm_type"] == "qwen3" else "whole",
        norm_after=text["norm_after"],
    )


def yarn_speeds(plain: torch.Tensor, theta: float, yarn: Mapping[str, Any]) -> torch.Tensor:
    """Rotary speeds of a stretched context: slow ones divided, fast ones kept, a ramp between."""
    size, original = 2 * len(plain), yarn["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """The pair of values that turns so often within the original context."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair(yarn["beta_slow"])), size - 1)
    ramp = ((torch.arange(len(plain)) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / yarn["factor"] * ramp


class ReferenceMolmo2(ReferenceModel[Molmo2Inputs]):
    """A Molmo 2 checkpoint, float32, on the CPU. Make one with `load`."""

    LM_HEAD = "lm_head"

    def __init__(self, config: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> None:
        # Molmo 1's names.
        short = {n.replace("self_attn.", "").replace("mlp.", ""): w for n, w in weights.items()}
        super().__init__(text_config(config["text_config"]), short)
        self._text, self._vit = config["text_config"], config["vit_config"]
        self._adapter = config["adapter_config"]
        self._ids = ImageIds.from_config(config)

    @classmethod
    def load(cls, directory: Path) -> ReferenceMolmo2:
        """Read `config.json` and `*.safetensors` of a directory.

        float32 tensors stay mapped to their file: do not rewrite it while the model is in use.
        Raises ModelError when a file or tensor is missing, broken or of another layout.
        """
        config = read_config(directory)
        check_layout(config)
        config["vit_config"] = {**VIT_DEFAULTS, **config["vit_config"]}
        config["adapter_config"] = {**ADAPTER_DEFAULTS, **config["adapter_config"]}
        config["text_config"] = {**TEXT_DEFAULTS, **config["text_config"]}
        return cls(config, read_weights(directory, molmo2_tensor_shapes(config)))

    # Images to features

    def _positions(self, side: int) -> torch.Tensor:
        """(side * side, tower width): the learned table, resized for a grid of another size."""
        table = self._w[VIT + "positional_embedding"]
        own = math.isqrt(len(table))
        if own == side:
            return table
        planes = table.unflatten(0, (own, own)).permute(2, 0, 1)[None]
        planes = F.interpolate(planes, (side, side), mode="bicubic", antialias=True)
        return planes[0].flatten(1).T

    def _tower(self, crop: torch.Tensor) -> torch.Tensor:
        """One crop, (patches, values), to (patches, layers read * tower width)."""
        count, eps, head = (
            self._vit[name] for name in ("num_hidden_layers", "layer_norm_eps", "head_dim")
        )
        used = [layer % count for layer in self._adapter["vit_layers"]]  # negative: from the last
        x = self._linear(crop, VIT + "patch_embedding") + self._positions(math.isqrt(len(crop)))
        states = []
        for i in range(max(used) + 1):
            block = f"{VIT_BLOCKS}{i}."
            h = self._layer_norm(x, block + "attention_norm", eps)
            x = x + self._attend_all(h, h, block + "attention.", head)
            h = self._layer_norm(x, block + "ffn_norm", eps)
            h = F.gelu(self._linear(h, block + "feed_forward.w1"), approximate="tanh")
            x = x + self._linear(h, block + "feed_forward.w2")
            states.append(x)
        return torch.cat([states[layer] for layer in used], dim=-1)

    def _pool(self, patches: torch.Tensor, pooling: torch.Tensor) -> torch.Tensor:
        """(all patches, c) to (features, pooled width): the mean of a window attends to it."""
        inside = pooling >= 0
        windows = patches[pooling.clamp(0)] * inside[:, :, None]
        mean = windows.sum(1, keepdim=True) / inside.sum(1)[:, None, None]
        head = self._adapter["head_dim"]
        return self._attend_all(mean, windows, POOL, head, inside[:, None, None])[:, 0]

    def image_features(self, inputs: Molmo2Inputs) -> torch.Tensor:
        """(features, hidden) float32."""
        patches = torch.cat([self._tower(crop) for crop in torch.tensor(inputs.patches)])
        return self._project(self._pool(patches, torch.tensor(inputs.pooling)))

    # Features into the sequence

    def _embed(self, input_ids: TokenIds, inputs: Molmo2Inputs | None) -> torch.Tensor:
        """(n, hidden): features are added to the embeddings of the `<im_patch>` tokens.

        Raises InputError when there is not one token for each feature.
        """
        ids = torch.tensor(input_ids)
        x = F.embedding(ids, self._embedding)
        if inputs is None:
            return x
        place = (ids == self._ids.patch).nonzero()[:, 0]
        if len(place) != len(inputs.pooling):
            raise InputError(
                f"The images have {len(inputs.pooling)} features, but the sequence has "
                f"{len(place)} image tokens for them."
            )
        return x.index_add(0, place, self.image_features(inputs))

    def _two_way(self, input_ids: TokenIds) -> torch.Tensor:
        # All image tokens of a prompt see each other.
        return torch.isin(torch.tensor(input_ids), torch.tensor(self._ids))

    def _rotary(self, layer: int) -> tuple[torch.Tensor, float]:
        speeds, scale = super()._rotary(layer)
        yarn, layers = self._text["rope_scaling"], self._text["rope_scaling_layers"]
        if yarn and (layers is None or layer in layers):
            return yarn_speeds(speeds, self.config.rope_theta, yarn), yarn["attention_factor"]
        return speeds, scale
