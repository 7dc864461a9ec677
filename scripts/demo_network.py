"""The demo's network: Molmo 2 for a batch, to be trained, and what its vision learns beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from demo_questions import STEP
from torch import nn

from molmo_edge.bench.scenes import COLORS, KINDS
from molmo_edge.devices.tensors import (
    BLOCKS,
    POOL,
    PROJECTOR,
    TEXT,
    VIT,
    VIT_BLOCKS,
    molmo2_tensor_shapes,
)
from molmo_edge.models.molmo2 import synthetic
from molmo_edge.models.molmo2.config import ImageIds, Processing
from molmo_edge.models.molmo2.tiling import Geometry, Tiling

SIDE = 140
GEOMETRY = Geometry(crop_px=SIDE, margin_patches=(1, 1))
# Of a coordinate, by steps: how much its neighbours are right too.
NEAR = torch.exp(
    -0.5 * ((torch.arange(1000 // STEP)[:, None] - torch.arange(1000 // STEP)) / 1.2) ** 2
)
NEAR /= NEAR.sum(1, keepdim=True)
PROCESSING = Processing(GEOMETRY, max_crops=1, max_frames=8)
VIT_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 5,
    "image_default_input_size": [SIDE, SIDE],
    "image_num_pos": GEOMETRY.n_patches,
}
TEXT_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 5,
    "vocab_size": 832,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
}
VIT_LAYERS = [-1, -3]
# Layers whose outputs are added up.
RESIDUAL = ("attn_out.weight", "ff_out.weight", "wo.weight", "feed_forward.w2.weight")


def patches(images: torch.Tensor) -> torch.Tensor:
    """(n, side, side, 3) uint8 to (n, patches, values) float32."""
    side, patch = GEOMETRY.crop_patches, GEOMETRY.patch_px
    cut = images.view(-1, side, patch, side, patch, 3).transpose(2, 3)
    return cut.flatten(3).flatten(1, 2) / 127.5 - 1.0


def config() -> dict[str, Any]:
    made = synthetic.hub_config(text=TEXT_SIZES, vit=VIT_SIZES, dtype="bfloat16")
    made["adapter_config"] |= {"vit_layers": VIT_LAYERS, "intermediate_size": 256}
    return made


def waves(count: int, width: int, slowest: float) -> torch.Tensor:
    """(count, width): places to begin with, alike where near; noise would have to be told apart."""
    half = width // 2
    angle = torch.arange(count)[:, None] * slowest ** (-torch.arange(half) / half)
    return torch.cat([angle.sin(), angle.cos()], -1)


def plane_waves(side: int) -> torch.Tensor:
    """(side², tower width): of the rows and of the columns of patches."""
    line = waves(side, int(VIT_SIZES["hidden_size"]) // 2, 100.0)
    return torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], -1)


class Twin(nn.Module):
    """Molmo 2 for a batch; the parameters have the checkpoint's names."""

    def __init__(self, seed: int, numbers: torch.Tensor) -> None:
        """`numbers` are the tokens of coordinates, ascending."""
        super().__init__()
        self.config = config()
        shapes = molmo2_tensor_shapes(self.config)
        torch.manual_seed(seed)
        self.names = {name: name.replace(".", "/") for name in shapes}
        depth = 2 * (int(TEXT_SIZES["num_hidden_layers"]) + int(VIT_SIZES["num_hidden_layers"]))
        for name, shape in shapes.items():
            if len(shape) == 1:
                value = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
            else:
                scale = 1 / math.sqrt(shape[1])
                if "wte" in name:
                    scale = 0.5
                elif name == "lm_head.weight":
                    scale = 0.02
                elif name.endswith(RESIDUAL):
                    scale /= math.sqrt(depth)
                value = torch.randn(shape) * scale
            self.register_parameter(self.names[name], nn.Parameter(value))
        with torch.no_grad():
            self.w(VIT + "positional_embedding").copy_(plane_waves(GEOMETRY.crop_patches))
            line = waves(len(numbers), int(TEXT_SIZES["hidden_size"]), 1000.0 / STEP)
            self.w(TEXT + "wte.embedding")[numbers] = 0.7 * line
            self.w("lm_head.weight")[numbers] = 0.03 * line
        self.ids = torch.tensor(ImageIds.from_config(self.config))
        pooling = torch.from_numpy(Tiling(GEOMETRY, 1, 1).pooling)[
            : Tiling(GEOMETRY, 1, 1).base_grid[0] ** 2
        ]
        self.image_pooling, self.frame_pooling = pooling, torch.from_numpy(GEOMETRY.frame_pooling)
        tower, hidden = int(VIT_SIZES["hidden_size"]), int(TEXT_SIZES["hidden_size"])
        outputs = 1 + len(KINDS) + 1 + len(COLORS) + 2 * len(NEAR)
        self.patch_head = nn.Linear(tower * len(VIT_LAYERS), outputs)
        self.cell_head = nn.Linear(hidden, outputs)

    def w(self, name: str) -> torch.Tensor:
        return self._parameters[self.names[name]]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.names.get(name + ".bias")
        return F.linear(x, self.w(name + ".weight"), self._parameters[bias] if bias else None)

    def layer_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w(name + ".weight"), self.w(name + ".bias"), 1e-6)

    def rms_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w(name + ".weight"), 1e-6)

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        name: str,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        size = int(VIT_SIZES["head_dim"])
        q, k, v = (
            self.linear(x, name + part).unflatten(-1, (-1, size)).transpose(-2, -3)
            for x, part in ((queries, "wq"), (keys, "wk"), (keys, "wv"))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.linear(out.transpose(-2, -3).flatten(-2), name + "wo")

    def tower(self, patches: torch.Tensor) -> torch.Tensor:
        """(n, patches, values) to (n, patches, layers read * width)."""
        count = int(VIT_SIZES["num_hidden_layers"])
        x = self.linear(patches, VIT + "patch_embedding") + self.w(VIT + "positional_embedding")
        states = []
        for i in range(count):
            block = f"{VIT_BLOCKS}{i}."
            h = self.layer_norm(x, block + "attention_norm")
            x = x + self.attend(h, h, block + "attention.")
            h = F.gelu(
                self.linear(self.layer_norm(x, block + "ffn_norm"), block + "feed_forward.w1"),
                approximate="tanh",
            )
            x = x + self.linear(h, block + "feed_forward.w2")
            states.append(x)
        return torch.cat([states[layer] for layer in VIT_LAYERS], -1)

    def features(self, states: torch.Tensor, pooling: torch.Tensor) -> torch.Tensor:
        """(n, patches, c) to (n, windows, hidden)."""
        inside = pooling >= 0
        windows = states[:, pooling.clamp(0)] * inside[..., None]
        mean = windows.sum(2, keepdim=True) / inside.sum(1)[:, None, None]
        n = len(states)
        pooled = self.attend(
            mean.flatten(0, 1), windows.flatten(0, 1), POOL,
            inside.repeat(n, 1)[:, None, None],
        ).view(n, len(pooling), -1)  # fmt: skip
        gate = F.silu(self.linear(pooled, PROJECTOR + "w1"))
        return self.linear(gate * self.linear(pooled, PROJECTOR + "w3"), PROJECTOR + "w2")

    def decode(
        self, x: torch.Tensor, position: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """(n, length, hidden) to the same, after the last norm."""
        size, heads = int(TEXT_SIZES["head_dim"]), int(TEXT_SIZES["num_attention_heads"])
        speeds = float(TEXT_SIZES["rope_theta"]) ** (-torch.arange(0, size, 2) / size)
        angle = position[:, None, :, None] * speeds
        cos, sin = angle.cos(), angle.sin()

        def rotate(t: torch.Tensor) -> torch.Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        for i in range(int(TEXT_SIZES["num_hidden_layers"])):
            block = f"{BLOCKS}{i}."
            h = self.linear(self.rms_norm(x, block + "attn_norm"), block + "self_attn.att_proj")
            q, k, v = (t.unflatten(-1, (heads, size)).transpose(1, 2) for t in h.chunk(3, -1))
            q = rotate(self.rms_norm(q, block + "self_attn.q_norm"))
            k = rotate(self.rms_norm(k, block + "self_attn.k_norm"))
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
            x = x + self.linear(h.transpose(1, 2).flatten(2), block + "self_attn.attn_out")
            up, gate = self.linear(
                self.rms_norm(x, block + "ff_norm"), block + "mlp.ff_proj"
            ).chunk(2, -1)
            x = x + self.linear(F.silu(gate) * up, block + "mlp.ff_out")
        return self.rms_norm(x, TEXT + "ln_f")

    def see(self, batch: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Features of images and of frames, and the loss of what was seen."""
        found, losses = {}, []
        for name, pooling in (("images", self.image_pooling), ("frames", self.frame_pooling)):
            if batch[name] is None:
                continue
            states = self.tower(patches(batch[name]))
            found[name] = self.features(states, pooling)
            truth = batch[f"{name}_seen"]
            normed = F.rms_norm(found[name], found[name].shape[-1:])
            # The frames of a clip are nearly the same.
            weight = 0.2 if name == "frames" else 1.0
            losses.append(2 * weight * seen_loss(self.patch_head, states, truth["patches"]))
            losses.append(weight * seen_loss(self.cell_head, normed, truth["cells"]))
            # As large as what the language model's layers add to them.
            losses.append(0.02 * found[name].square().mean())
        return found, sum(losses, torch.zeros(()))

    def embed(self, batch: Mapping[str, Any], found: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tokens = batch["tokens"]
        table = torch.cat([self.w(TEXT + "wte.embedding"), self.w(TEXT + "wte.new_embedding")])
        x = F.embedding(tokens, table)
        patch = tokens == self.ids[2]
        parts = torch.zeros_like(x)
        for name, clip in (("images", False), ("frames", True)):
            if name in found:
                values = found[name]
                if not clip:  # the global view, and its only crop, which is the same
                    values = values.repeat(1, 2, 1)
                parts = parts.masked_scatter(
                    (patch & (batch["clip"] == clip)[:, None])[..., None], values
                )
        return x + parts

    def forward(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the tokens of answers, (answers, vocabulary), and the loss of what was seen."""
        found, loss = self.see(batch)
        branch, tokens = batch["branch"], batch["tokens"]
        n = tokens.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        visible = causal & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))
        of_images = torch.isin(tokens, self.ids)
        visible = visible | (of_images[:, :, None] & of_images[:, None, :])
        bias = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[:, None]
        x = self.decode(self.embed(batch, found), batch["position"], bias)
        before = batch["answer"].roll(-1, 1)
        before[:, -1] = False
        return self.linear(x[before], "lm_head"), loss


def seen_loss(head: nn.Linear, states: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Of kind and colour (0 for none) everywhere, and of the place where a shape is.

    `truth` is (..., 4): kind, colour, and the centre's x and y in steps of coordinates.
    """
    truth, states = truth.flatten(0, 1), states.flatten(0, 1)
    kinds, colors = 1 + len(KINDS), 1 + len(COLORS)
    there = truth[:, 0] > 0
    weight = torch.where(there, 1.0, 0.3)
    named = F.linear(states, head.weight[: kinds + colors], head.bias[: kinds + colors])
    kind, color = named.split((kinds, colors), -1)
    loss = F.cross_entropy(kind, truth[:, 0], reduction="none")
    loss = loss + F.cross_entropy(color, truth[:, 1], reduction="none")
    place = F.linear(states[there], head.weight[kinds + colors :], head.bias[kinds + colors :])
    logs = place.unflatten(-1, (2, len(NEAR))).log_softmax(-1)
    far = -(logs * NEAR[truth[there, 2:]]).sum() / there.sum().clamp(1)
    return (loss * weight).sum() / weight.sum() + 0.5 * far
