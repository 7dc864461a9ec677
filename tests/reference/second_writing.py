"""Molmo 1 written a second time, another way, to compare the reference implementation with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from molmo_edge.reference.molmo_inputs import ReferenceInputs
from tests.reference.tiny_reference import TOWER


def by_hand(tensors: Mapping[str, torch.Tensor], config: dict[str, Any], x: Any) -> Any:
    """The language model once more: float64, one position and one head at a time."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, head = config["num_key_value_heads"], config["hidden_size"] // heads

    def w(name: str) -> Any:
        return tensors[f"model.transformer.{name}"].double().numpy()

    def rms(v: Any, name: str) -> Any:
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + config["layer_norm_eps"]) * w(name)

    def turned(v: Any, position: int) -> Any:
        speed = config["rope_theta"] ** (-np.arange(head // 2) / (head // 2))
        pairs = (v[: head // 2] + 1j * v[head // 2 :]) * np.exp(1j * position * speed)
        return np.concatenate([pairs.real, pairs.imag])

    def attention(h: Any, b: str) -> Any:
        fused = h @ w(b + "att_proj.weight").T
        if config["qkv_bias"]:
            fused = fused + w(b + "att_proj.bias")
        q, k, v = fused[:, :d], fused[:, d : d + kv_heads * head], fused[:, d + kv_heads * head :]
        if config["attention_layer_norm"]:
            q, k = rms(q, b + "q_norm.weight"), rms(k, b + "k_norm.weight")
        out = np.zeros_like(q)
        for i in range(heads):
            own = slice(i * head, (i + 1) * head)
            shared = i * kv_heads // heads
            theirs = slice(shared * head, (shared + 1) * head)
            for t in range(len(h)):
                query = turned(q[t, own], t)
                keys = [turned(k[s, theirs], s) for s in range(t + 1)]
                weight = np.exp([query @ key / head**0.5 for key in keys])
                out[t, own] = weight / weight.sum() @ v[: t + 1, theirs]
        return out @ w(b + "attn_out.weight").T

    def mlp(h: Any, b: str) -> Any:
        up, gate = np.split(h @ w(b + "ff_proj.weight").T, 2, axis=-1)
        return (gate / (1 + np.exp(-gate)) * up) @ w(b + "ff_out.weight").T

    for i in range(config["num_hidden_layers"]):
        b = f"blocks.{i}."
        if config["norm_after"]:
            x = x + rms(attention(x, b), b + "attn_norm.weight")
            x = x + rms(mlp(x, b), b + "ff_norm.weight")
        else:
            x = x + attention(rms(x, b + "attn_norm.weight"), b)
            x = x + mlp(rms(x, b + "ff_norm.weight"), b)
    return rms(x, "ln_f.weight") @ w("ff_out.weight").T


def features_by_library(
    tensors: Mapping[str, torch.Tensor], inputs: ReferenceInputs
) -> torch.Tensor:
    """The vision side once more, from torch's own layers and batched over the crops."""

    def w(name: str) -> torch.Tensor:
        return tensors[f"model.vision_backbone.{name}"]

    images, masks = torch.tensor(inputs.images), torch.tensor(inputs.image_masks)
    x = images @ w("image_vit.patch_embedding.weight").T
    x = torch.cat([w("image_vit.class_embedding").expand(len(x), 1, -1), x], 1)
    x = x + w("image_vit.positional_embedding")
    x = F.layer_norm(x, x.shape[-1:], w("image_vit.pre_ln.weight"), w("image_vit.pre_ln.bias"))
    states = []
    names = {
        "self_attn.out_proj": "attention.wo",
        "linear1": "feed_forward.w1",
        "linear2": "feed_forward.w2",
        "norm1": "attention_norm",
        "norm2": "ffn_norm",
    }
    for i in range(TOWER.blocks):
        layer = torch.nn.TransformerEncoderLayer(
            TOWER.width,
            TOWER.width // 64,
            TOWER.mlp,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
            activation=lambda h: h * torch.sigmoid(1.702 * h),
        ).eval()
        b = f"image_vit.transformer.resblocks.{i}."
        state = {}
        for part in ("weight", "bias"):
            state |= {f"{name}.{part}": w(f"{b}{ours}.{part}") for name, ours in names.items()}
            qkv = [w(f"{b}attention.{name}.{part}") for name in ("wq", "wk", "wv")]
            state[f"self_attn.in_proj_{part}"] = torch.cat(qkv)
        layer.load_state_dict(state)
        x = layer(x)
        states.append(x)
    x = torch.cat([states[-2], states[-9]], -1)[:, 1:]
    x[masks == 0] += w("pad_embed")[0]
    x[(masks < 1) & (masks != 0)] += w("pad_embed")[1]
    grid = x.unflatten(1, (24, 24))
    corners = [grid[:, a::2, b::2].flatten(1, 2) for a in (0, 1) for b in (0, 1)]
    windows = torch.stack(corners, 2)  # (views, 144, 4, channels)

    def project(v: torch.Tensor, name: str) -> torch.Tensor:
        p = "image_pooling_2d." + name
        out = F.linear(v, w(p + ".weight"), w(p + ".bias"))
        return out.unflatten(-1, (-1, 64)).transpose(2, 3)

    pooled = F.scaled_dot_product_attention(
        project(sum(corners)[:, :, None] / 4, "wq"), project(windows, "wk"), project(windows, "wv")
    ).flatten(2)
    pooled = F.linear(pooled, w("image_pooling_2d.wo.weight"), w("image_pooling_2d.wo.bias"))
    gate = F.silu(pooled @ w("image_projector.w1.weight").T)
    return (gate * (pooled @ w("image_projector.w3.weight").T)) @ w("image_projector.w2.weight").T
