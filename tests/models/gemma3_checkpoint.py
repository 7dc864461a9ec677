"""A random Gemma 3 of a few hundred thousand weights, in the hub's file layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

IMAGE_SIZE = 112
IMAGE_TOKENS = 16
# Small enough for the prompts of the tests to be longer, and longer than a picture.
SLIDING_WINDOW = 24
END_OF_TURN = "<end_of_turn>"
START_OF_IMAGE = "<start_of_image>"
SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    END_OF_TURN,
    START_OF_IMAGE,
    "<end_of_image>",
    "<image_soft_token>",
)
# In the hub's vocabulary too these are added tokens, and belong to plain text.
NEWLINES = tuple("\n" * n for n in range(1, 6))
TAGS = ("<table>", "</table>", "<b>", "</b>")
_WORDS = "user model what is in the picture this and that first second red mug table a of".split()

# The words of Gemma 3's own template, written anew.
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
    """Writes a whole multimodal checkpoint into `folder` and returns it."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
    )

    vocab = write_tokenizer(folder)
    config = Gemma3Config(
        text_config=text_config(len(vocab)),
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
        boi_token_index=vocab[START_OF_IMAGE],
        eoi_token_index=vocab["<end_of_image>"],
        image_token_index=vocab["<image_soft_token>"],
        eos_token_id=[vocab["<eos>"], vocab[END_OF_TURN]],
    )
    _save(Gemma3ForConditionalGeneration(config), folder, seed)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_pan_and_scan": None,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": IMAGE_TOKENS,
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        },
    )
    _write_json(
        folder / "processor_config.json",
        {"image_seq_length": IMAGE_TOKENS, "processor_class": "Gemma3Processor"},
    )
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return folder


def write_gemma3_text(folder: Path, *, seed: int = 0) -> Path:
    """Like `write_gemma3`, without the vision tower."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    vocab = write_tokenizer(folder)
    _save(Gemma3ForCausalLM(Gemma3TextConfig(**text_config(len(vocab)))), folder, seed)
    return folder


def text_config(vocab_size: int) -> dict[str, Any]:
    """One sliding layer and one full one."""
    return {
        "vocab_size": vocab_size,
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
    }


def _save(model: Any, folder: Path, seed: int) -> None:
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_weight(name, weight.shape, generator))
    model.save_pretrained(folder)
    # transformers 5 leaves a level out that the hub's files have.
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": SPECIAL.index("<bos>"),
            "do_sample": False,
            "eos_token_id": [SPECIAL.index("<eos>"), SPECIAL.index(END_OF_TURN)],
            "pad_token_id": SPECIAL.index("<pad>"),
        },
    )


def _weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Activations of order one, so that every part of the model is heard."""
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


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Byte-fallback BPE of letters and a few words; returns the whole vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    folder.mkdir(parents=True, exist_ok=True)
    pieces = [*SPECIAL, *NEWLINES, *TAGS, *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += [chr(i) for i in range(33, 127)]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        for i in range(1, len(word)):
            _merge(word[:i], word[i], pieces, merges)
        _merge("▁", word, pieces, merges)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (*NEWLINES, *TAGS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    image_tokens = {
        "boi_token": START_OF_IMAGE,
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<bos>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<eos>",
            "extra_special_tokens": image_tokens,
            "model_max_length": 1024,
            "pad_token": "<pad>",
            "processor_class": "Gemma3Processor",
            "tokenizer_class": "GemmaTokenizer",
            "unk_token": "<unk>",
            **image_tokens,
        },
    )
    return vocab


def _merge(left: str, right: str, pieces: list[str], merges: list[tuple[str, str]]) -> None:
    if (left, right) not in merges:
        merges.append((left, right))
        pieces.append(left + right)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
