"""What the reference implementations of Molmo 1 and Molmo 2 share: layers, and the language model.

Plain float32 torch, one sequence at a time, with a cache of keys and values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from molmo_edge.devices.tensors import BLOCKS, PROJECTOR, TEXT
from molmo_edge.reference.checkpoint import TextConfig

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]
Cache = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: keys, values (kv heads, seen, head)
Inputs = TypeVar("Inputs")


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
    if q.ndim == 3:  # torch is slow without a batch
        return _attention(q[None], k[None], v[None], visible)[0]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return out.transpose(-2, -3).flatten(-2)


def rotary_speeds(size: int, theta: float) -> torch.Tensor:
    """Radians per position of each pair of a head's values, (size / 2,)."""
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)


def _rotate(x: torch.Tensor, start: int, speeds: torch.Tensor, scale: float) -> torch.Tensor:
    """Rotary positions for (heads, n, size), first position `start`; halves are rotated."""
    position = torch.arange(start, start + x.shape[-2], dtype=torch.float32)
    angle = position[:, None] * speeds
    cos, sin = angle.cos() * scale, angle.sin() * scale
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class ReferenceModel(Generic[Inputs]):
    """Embeddings to logits and tokens, on the CPU; a model adds its images.

    Args:
        weights: float32, named as on the hub's Molmo 1, the LM head apart.
    """

    LM_HEAD = TEXT + "ff_out"

    def __init__(self, config: TextConfig, weights: dict[str, torch.Tensor]) -> None:
        self.config = config
        self._w = dict(weights)
        self._embedding = torch.cat(  # ids after the vocabulary are the new tokens
            [self._w.pop(TEXT + "wte.embedding"), self._w.pop(TEXT + "wte.new_embedding")]
        )

    # What a model adds

    def _embed(self, input_ids: TokenIds, inputs: Inputs | None) -> torch.Tensor:
        """(n, hidden): embeddings of the tokens and the features of the images."""
        raise NotImplementedError

    def _two_way(self, input_ids: TokenIds) -> torch.Tensor | None:
        """(n,) bool: the tokens that see each other whatever their order; None for none."""
        return None

    def _rotary(self, layer: int) -> tuple[torch.Tensor, float]:
        """Speeds of a layer's rotary positions, and the factor of its cosines and sines."""
        return rotary_speeds(self.config.head, self.config.rope_theta), 1.0

    # Layers

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self._w[name + ".weight"], self._w.get(name + ".bias"))

    def _layer_norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        weight, bias = self._w[name + ".weight"], self._w[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def _rms_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        square = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(square + self.config.eps) * self._w[name + ".weight"]

    def _attend_all(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        name: str,
        head: int,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the vision tower and of the pooling: every query sees every visible key."""
        q = _heads(self._linear(queries, name + "wq"), head)
        k = _heads(self._linear(keys, name + "wk"), head)
        v = _heads(self._linear(keys, name + "wv"), head)
        return self._linear(_attention(q, k, v, visible), name + "wo")

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features to features as wide as the embeddings."""
        gate = F.silu(self._linear(x, PROJECTOR + "w1"))
        return self._linear(gate * self._linear(x, PROJECTOR + "w3"), PROJECTOR + "w2")

    # The language model

    def _attend(
        self, x: torch.Tensor, block: str, cache: Cache, layer: int, two_way: torch.Tensor | None
    ) -> torch.Tensor:
        c = self.config
        widths = [heads * c.head for heads in (c.heads, c.kv_heads, c.kv_heads)]
        q, k, v = self._linear(x, block + "att_proj").split(widths, -1)
        if c.qk_norm == "whole":  # over all heads together
            q, k = self._rms_norm(q, block + "q_norm"), self._rms_norm(k, block + "k_norm")
        q, k, v = (_heads(t, c.head) for t in (q, k, v))
        if c.qk_norm == "head":
            q, k = self._rms_norm(q, block + "q_norm"), self._rms_norm(k, block + "k_norm")
        old_k, old_v = cache[layer]
        past, new = old_k.shape[1], len(x)
        speeds, scale = self._rotary(layer)
        q, k = _rotate(q, past, speeds, scale), _rotate(k, past, speeds, scale)
        k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        cache[layer] = (k, v)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, dim=0) for t in (k, v))
        visible = torch.ones(new, past + new, dtype=torch.bool).tril(past)
        if two_way is not None:
            visible |= two_way[:, None] & two_way
        return self._linear(_attention(q, k, v, visible), block + "attn_out")

    def _feed_forward(self, x: torch.Tensor, block: str) -> torch.Tensor:
        up, gate = self._linear(x, block + "ff_proj").chunk(2, -1)  # the second half is the gate
        return self._linear(F.silu(gate) * up, block + "ff_out")

    def _block(
        self, x: torch.Tensor, cache: Cache, layer: int, two_way: torch.Tensor | None = None
    ) -> torch.Tensor:
        block = f"{BLOCKS}{layer}."
        attn_norm, ff_norm = block + "attn_norm", block + "ff_norm"
        if self.config.norm_after:
            x = x + self._rms_norm(self._attend(x, block, cache, layer, two_way), attn_norm)
            return x + self._rms_norm(self._feed_forward(x, block), ff_norm)
        x = x + self._attend(self._rms_norm(x, attn_norm), block, cache, layer, two_way)
        return x + self._feed_forward(self._rms_norm(x, ff_norm), block)

    def _decode(
        self, x: torch.Tensor, cache: Cache, two_way: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings of the new positions to their final states, both (n, hidden)."""
        for layer in range(self.config.layers):
            x = self._block(x, cache, layer, two_way)
        return self._rms_norm(x, TEXT + "ln_f")

    def _new_cache(self) -> Cache:
        empty = torch.empty(self.config.kv_heads, 0, self.config.head)
        return [(empty, empty)] * self.config.layers

    # Logits to tokens

    def logits(self, input_ids: TokenIds, inputs: Inputs | None = None) -> torch.Tensor:
        """(n, vocabulary) float32: row i scores the token after position i."""
        with torch.no_grad():
            x, two_way = self._embed(input_ids, inputs), self._two_way(input_ids)
            return self._linear(self._decode(x, self._new_cache(), two_way), self.LM_HEAD)

    def generate(
        self,
        input_ids: TokenIds,
        inputs: Inputs | None = None,
        *,
        max_tokens: int,
        stop_ids: Collection[int] = (),
    ) -> ReferenceOutput:
        """Greedy decoding, up to `max_tokens` or a stop token, which is kept."""
        token_ids: list[int] = []
        logprobs: list[float] = []
        cache = self._new_cache()
        with torch.no_grad():
            x, two_way = self._embed(input_ids, inputs), self._two_way(input_ids)
            for _ in range(max_tokens):
                last = self._decode(x, cache, two_way)[-1]
                scores = self._linear(last, self.LM_HEAD).log_softmax(-1)
                token = int(scores.argmax())
                token_ids.append(token)
                logprobs.append(float(scores[token]))
                if token in stop_ids:
                    break
                x, two_way = self._embed([token], None), None
        return ReferenceOutput(token_ids, logprobs)
