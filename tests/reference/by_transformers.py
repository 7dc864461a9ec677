"""Molmo 1 put together from other people's models, to compare the reference implementation with.

Molmo-7B-D's language model is a Qwen2, Molmo-7B-O's an OLMo 2, and the tower of both is CLIP's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from molmo_edge.reference.molmo_inputs import ReferenceInputs
from tests.reference.tiny_reference import TOWER, Tensors


def language_model(tensors: Tensors, config: dict[str, Any]) -> Any:
    """transformers' model with our weights; call it with `inputs_embeds`."""
    like_qwen = config["qkv_bias"]
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_width = config["num_key_value_heads"] * width // heads
    sizes = {
        "vocab_size": config["embedding_size"],
        "hidden_size": width,
        "intermediate_size": config["intermediate_size"] // 2,
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config["num_key_value_heads"],
        "rms_norm_eps": config["layer_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
    }
    text = {name.removeprefix("model.transformer."): t for name, t in tensors.items()}
    state = {
        "model.embed_tokens.weight": text["wte.embedding"],
        "model.norm.weight": text["ln_f.weight"],
        "lm_head.weight": text["ff_out.weight"],
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    if not like_qwen:
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias") if like_qwen else ("weight",):
            qkv = text[f"{ours}att_proj.{kind}"].split([width, kv_width, kv_width])
            for name, tensor in zip("qkv", qkv, strict=True):
                state[f"{theirs}self_attn.{name}_proj.{kind}"] = tensor
        for name in () if like_qwen else ("q_norm", "k_norm"):
            state[f"{theirs}self_attn.{name}.weight"] = text[f"{ours}{name}.weight"]
        up, gate = text[f"{ours}ff_proj.weight"].chunk(2)
        state |= {
            f"{theirs}self_attn.o_proj.weight": text[f"{ours}attn_out.weight"],
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.down_proj.weight": text[f"{ours}ff_out.weight"],
            f"{theirs}{norms[0]}.weight": text[f"{ours}attn_norm.weight"],
            f"{theirs}{norms[1]}.weight": text[f"{ours}ff_norm.weight"],
        }
    model = (
        Qwen2ForCausalLM(Qwen2Config(**sizes))
        if like_qwen
        else Olmo2ForCausalLM(Olmo2Config(**sizes))
    )
    model.load_state_dict(state)
    return model.eval()


CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding",
    "pre_ln": "pre_layrnorm",
    "transformer.resblocks": "encoder.layers",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "ffn_norm": "layer_norm2",
    "feed_forward.w": "mlp.fc",
}


def image_features(tensors: Tensors, inputs: ReferenceInputs) -> torch.Tensor:
    """(views, 144, hidden) by CLIP and torch's attention, batched over the views."""
    vision = {name.removeprefix("model.vision_backbone."): t for name, t in tensors.items()}
    state = {}
    for name, tensor in vision.items():
        if name.startswith("image_vit."):
            for ours, theirs in CLIP_NAMES.items():
                name = name.replace(ours, theirs)
            state[name.removeprefix("image_vit.")] = tensor
    # Ours are flattened as (row, column, channel).
    kernel = state["embeddings.patch_embedding.weight"].unflatten(1, (14, 14, 3))
    state["embeddings.patch_embedding.weight"] = kernel.permute(0, 3, 1, 2)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=TOWER.width,
            intermediate_size=TOWER.mlp,
            num_hidden_layers=TOWER.blocks,
            num_attention_heads=TOWER.width // 64,
            image_size=336,
            patch_size=14,
        )
    ).eval()
    missing, unexpected = tower.load_state_dict(state, strict=False)
    assert not unexpected and all("post_layernorm" in name for name in missing)
    pixels = torch.tensor(inputs.images).view(-1, 24, 24, 14, 14, 3)
    pixels = pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, 336, 336)
    states = tower(pixels, output_hidden_states=True).hidden_states
    x = torch.cat([states[-2], states[-9]], -1)[:, 1:]
    masks = torch.tensor(inputs.image_masks)
    x[masks == 0] += vision["pad_embed"][0]
    x[(masks < 1) & (masks != 0)] += vision["pad_embed"][1]
    grid = x.unflatten(1, (24, 24))
    corners = [grid[:, a::2, b::2].flatten(1, 2) for a in (0, 1) for b in (0, 1)]
    windows = torch.stack(corners, 2)  # (views, 144, 4, channels)

    def linear(v: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = (vision[f"image_pooling_2d.{name}.{part}"] for part in ("weight", "bias"))
        return F.linear(v, weight, bias)

    def heads(v: torch.Tensor, name: str) -> torch.Tensor:
        return linear(v, name).unflatten(-1, (-1, 64)).transpose(2, 3)

    query = sum(corners)[:, :, None] / 4
    pooled = F.scaled_dot_product_attention(
        heads(query, "wq"), heads(windows, "wk"), heads(windows, "wv")
    )
    pooled = linear(pooled.flatten(2), "wo")
    w1, w2, w3 = (vision[f"image_projector.w{i}.weight"] for i in (1, 2, 3))
    return (F.silu(pooled @ w1.T) * (pooled @ w3.T)) @ w2.T
