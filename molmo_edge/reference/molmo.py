"""The reference implementation: Molmo 1 in plain float32 torch, to be read in one sitting.

Written from the architecture as published (Molmo-7B-D-0924, -7B-O-0924, -72B-0924), one image and
one sequence at a time, for clarity rather than speed. It reads the hub's tensor names. It shares no
computing code with vLLM, transformers or molmo_edge's own model and processor, because the engine's
answers are compared with its answers. It knows nothing about tokenizers.

The order of computation is the order of the file: image to features, features into the sequence,
sequence to logits, logits to tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from molmo_edge.devices.tensors import BLOCKS, POOL, PROJECTOR, TEXT, VISION, VIT, VIT_BLOCKS
from molmo_edge.errors import InputError
from molmo_edge.reference.molmo_checkpoint import TextConfig, count_blocks, read_checkpoint
from molmo_edge.reference.molmo_inputs import ReferenceInputs

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]
Cache = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: keys, values (kv heads, seen, head)

# Checkpoints do not state these.
VIT_EPS = 1e-5  # layer norms of the vision tower
VIT_HEAD = 64  # head size of the vision tower and of the pooling


@dataclass(frozen=True)
class ReferenceOutput:
    """Greedy tokens (a stop token included) and the log-probability of each."""

    token_ids: list[int]
    logprobs: list[float]


def _heads(x: torch.Tensor, size: int) -> torch.Tensor:
    """(..., n, heads * size) to (..., heads, n, size)."""
    return x.unflatten(-1, (-1, size)).transpose(-2, -3)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """(..., heads, n, size) each, to (..., n, heads * size)."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def _rotate(x: torch.Tensor, start: int, theta: float) -> torch.Tensor:
    """Rotary positions for (heads, n, size), first position `start`; halves are rotated."""
    size = x.shape[-1]
    speed = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    position = torch.arange(start, start + x.shape[-2], dtype=torch.float32)
    angle = position[:, None] * speed
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


class ReferenceMolmo:
    """A Molmo 1 checkpoint, float32, on the CPU. Make one with `load`."""

    def __init__(self, config: TextConfig, weights: dict[str, torch.Tensor]) -> None:
        self.config = config
        self._w = dict(weights)
        self._vit_blocks = count_blocks(weights, VIT_BLOCKS)
        self._embedding = torch.cat(  # ids after the vocabulary are the new tokens
            [self._w.pop(TEXT + "wte.embedding"), self._w.pop(TEXT + "wte.new_embedding")]
        )

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self._w[name + ".weight"], self._w.get(name + ".bias"))

    def _layer_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self._w[name + ".weight"], self._w[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, VIT_EPS)

    def _rms_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        square = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(square + self.config.eps) * self._w[name + ".weight"]

    @classmethod
    def load(cls, directory: Path) -> ReferenceMolmo:
        """Read `config.json` and `*.safetensors` of a directory.

        float32 tensors stay mapped to their file: do not rewrite it while the model is in use.
        Raises ModelError when a file or tensor is missing, broken or of another layout.
        """
        return cls(*read_checkpoint(Path(directory)))

    # Image to features

    def _attend_all(self, queries: torch.Tensor, keys: torch.Tensor, name: str) -> torch.Tensor:
        """Attention of the tower and of the pooling: every query sees every key."""
        q = _heads(self._linear(queries, name + "wq"), VIT_HEAD)
        k = _heads(self._linear(keys, name + "wk"), VIT_HEAD)
        v = _heads(self._linear(keys, name + "wv"), VIT_HEAD)
        return self._linear(_attention(q, k, v), name + "wo")

    def _tower(self, crop: torch.Tensor) -> torch.Tensor:
        """One crop, (576, 588) pixels, to (576, 2 * tower width)."""
        patches = self._linear(crop, VIT + "patch_embedding")
        x = torch.cat([self._w[VIT + "class_embedding"][None], patches])
        x = self._layer_norm(x + self._w[VIT + "positional_embedding"], VIT + "pre_ln")
        states = []
        for i in range(self._vit_blocks):
            block = f"{VIT_BLOCKS}{i}."
            h = self._layer_norm(x, block + "attention_norm")
            x = x + self._attend_all(h, h, block + "attention.")
            h = self._linear(self._layer_norm(x, block + "ffn_norm"), block + "feed_forward.w1")
            x = x + self._linear(h * torch.sigmoid(1.702 * h), block + "feed_forward.w2")
            states.append(x)
        return torch.cat([states[-2], states[-9]], dim=-1)[1:]  # without the class token

    def _pool(self, features: torch.Tensor) -> torch.Tensor:
        """(576, c) features of a crop to (144, pooled width): one per 2 x 2 window."""
        windows = features.reshape(12, 2, 12, 2, -1).permute(0, 2, 1, 3, 4).reshape(144, 4, -1)
        return self._attend_all(windows.mean(1, keepdim=True), windows, POOL)[:, 0]

    def image_features(self, inputs: ReferenceInputs) -> torch.Tensor:
        """(1 + crops, 144, hidden) float32."""
        out = []
        padding = self._w[VISION + "pad_embed"]
        crops, masks = torch.tensor(inputs.images), torch.tensor(inputs.image_masks)
        for crop, mask in zip(crops, masks, strict=True):
            all_pad, part_pad = mask == 0, (mask < 1) & (mask != 0)
            x = self._tower(crop)
            x = x + padding[0] * all_pad[:, None] + padding[1] * part_pad[:, None]
            x = self._pool(x)
            gate = F.silu(self._linear(x, PROJECTOR + "w1"))
            out.append(self._linear(gate * self._linear(x, PROJECTOR + "w3"), PROJECTOR + "w2"))
        return torch.stack(out)

    # Features into the sequence, sequence to logits

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

    def _attend(self, x: torch.Tensor, block: str, cache: Cache, layer: int) -> torch.Tensor:
        c = self.config
        kv_width = c.kv_heads * c.head
        q, k, v = self._linear(x, block + "att_proj").split([c.width, kv_width, kv_width], -1)
        if c.qk_norm:  # over all heads together
            q, k = self._rms_norm(q, block + "q_norm"), self._rms_norm(k, block + "k_norm")
        q, k, v = (_heads(t, c.head) for t in (q, k, v))
        old_k, old_v = cache[layer]
        past, new = old_k.shape[1], len(x)
        q, k = _rotate(q, past, c.rope_theta), _rotate(k, past, c.rope_theta)
        k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        cache[layer] = (k, v)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, dim=0) for t in (k, v))
        visible = torch.ones(new, past + new, dtype=torch.bool).tril(past)
        return self._linear(_attention(q, k, v, visible), block + "attn_out")

    def _feed_forward(self, x: torch.Tensor, block: str) -> torch.Tensor:
        up, gate = self._linear(x, block + "ff_proj").chunk(2, -1)  # the second half is the gate
        return self._linear(F.silu(gate) * up, block + "ff_out")

    def _block(self, x: torch.Tensor, cache: Cache, layer: int) -> torch.Tensor:
        block = f"{BLOCKS}{layer}."
        attn_norm, ff_norm = block + "attn_norm", block + "ff_norm"
        if self.config.norm_after:
            x = x + self._rms_norm(self._attend(x, block, cache, layer), attn_norm)
            return x + self._rms_norm(self._feed_forward(x, block), ff_norm)
        x = x + self._attend(self._rms_norm(x, attn_norm), block, cache, layer)
        return x + self._feed_forward(self._rms_norm(x, ff_norm), block)

    def _decode(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Embeddings of the new positions to their final states, both (n, hidden)."""
        for layer in range(self.config.layers):
            x = self._block(x, cache, layer)
        return self._rms_norm(x, TEXT + "ln_f")

    def _new_cache(self) -> Cache:
        empty = torch.empty(self.config.kv_heads, 0, self.config.head)
        return [(empty, empty)] * self.config.layers

    def logits(self, input_ids: TokenIds, inputs: ReferenceInputs | None = None) -> torch.Tensor:
        """(n, vocabulary) float32: row i scores the token after position i."""
        with torch.no_grad():
            states = self._decode(self._embed(input_ids, inputs), self._new_cache())
            return self._linear(states, TEXT + "ff_out")

    # Logits to tokens

    def generate(
        self,
        input_ids: TokenIds,
        inputs: ReferenceInputs | None = None,
        *,
        max_tokens: int,
        stop_ids: Collection[int] = (),
    ) -> ReferenceOutput:
        """Greedy decoding, up to `max_tokens` or a stop token, which is kept."""
        token_ids: list[int] = []
        logprobs: list[float] = []
        cache = self._new_cache()
        with torch.no_grad():
            x = self._embed(input_ids, inputs)
            for _ in range(max_tokens):
                last = self._decode(x, cache)[-1]
                scores = self._linear(last, TEXT + "ff_out").log_softmax(-1)
                token = int(scores.argmax())
                token_ids.append(token)
                logprobs.append(float(scores[token]))
                if token in stop_ids:
                    break
                x = self._embed([token], None)
        return ReferenceOutput(token_ids, logprobs)
