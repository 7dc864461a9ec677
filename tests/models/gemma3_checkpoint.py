"""A random Gemma 3 of a few hundred thousand weights, with the hub's tensor names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    GemmaTokenizer,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

IMAGE_SIZE = 112
IMAGE_TOKENS = 16
# Small enough for the prompts of the tests to be longer, and longer than an image.
SLIDING_WINDOW = 24
SPECIAL = (
    "<pad> <eos> <bos> <unk> <mask> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> "
    "<image_soft_token>"
).split()
# Ids that end an answer.
ENDS = [SPECIAL.index("<eos>"), SPECIAL.index("<end_of_turn>")]
# In the hub's vocabulary too these are added tokens, and belong to plain text.
PLAIN = (*("\n" * n for n in range(1, 6)), "<table>", "</table>", "<b>", "</b>")

# The content of Gemma 3's own template, written anew.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for m in messages -%}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] | trim }}"
    "{%- else -%}{%- for part in m['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def write_gemma3(folder: Path, *, seed: int = 0) -> Path:
    """Write a whole checkpoint into `folder` and return it."""
    tokenizer = _tokenizer()
    Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
        image_seq_length=IMAGE_TOKENS,
    ).save_pretrained(folder)
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": SLIDING_WINDOW,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=SPECIAL.index("<start_of_image>"),
        eoi_token_index=SPECIAL.index("<end_of_image>"),
        image_token_index=SPECIAL.index("<image_soft_token>"),
        eos_token_id=ENDS,
    )
    model = Gemma3ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_weight(name, weight.shape, generator))
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    # transformers 5 leaves a level out that the hub's files have.
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Activations of order one, so that every part of the model matters."""
    values = torch.randn(shape, generator=generator)
    if "embed_tokens" in name:
        # Little of the residual stream, or the answer repeats the prompt's last token.
        return values * 0.02
    if len(shape) > 1:
        return values * (0.3 if "position" in name else shape[1:].numel() ** -0.5)
    if name.endswith(("model.norm.weight", "language_model.norm.weight")):
        # Sharp answers, in spite of small embeddings, which are the head too.
        return values * 0.1 + 20.0
    if name.endswith(("layer_norm1.weight", "layer_norm2.weight", "post_layernorm.weight")):
        return values * 0.1 + 1.0
    return values * 0.1


def _tokenizer() -> Any:
    """Gemma's, with a vocabulary of characters and bytes."""
    pieces = [*SPECIAL, *PLAIN, *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += [chr(i) for i in range(33, 127)]
    tokenizer = GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        model_max_length=1024,
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False
    )
    tokenizer.add_tokens(list(PLAIN))
    return tokenizer
