"""Config and processor read the hub's files, and never run code from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from molmo_edge.checkpoint_files import read_config
from molmo_edge.errors import ImageError, ModelError
from molmo_edge.models.molmo.hf import MolmoConfig, MolmoProcessor
from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
from molmo_edge.models.molmo.prompts import ImageTokenIds
from molmo_edge.reference.molmo_inputs import preprocess, sequence

IMAGE = np.random.default_rng(0).integers(0, 256, (150, 400, 3), dtype=np.uint8)


def test_the_auto_classes_use_ours_and_run_no_code_of_the_checkpoint(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    directory, witness = tmp_path / "trapped", tmp_path / "executed"
    shutil.copytree(small_checkpoint, directory)
    trap = f"open({str(witness)!r}, 'w').close()\n"
    for name in ("config", "modeling", "preprocessing", "image_preprocessing"):
        (directory / f"{name}_molmo.py").write_text(trap)
    assert isinstance(AutoConfig.from_pretrained(directory), MolmoConfig)
    processor = AutoProcessor.from_pretrained(directory)
    assert isinstance(processor, MolmoProcessor)
    assert isinstance(processor.image_processor, MolmoImageProcessor)
    assert not witness.exists()


def test_the_whole_sequence_equals_the_references(small_checkpoint: Path) -> None:
    processor = MolmoProcessor.from_pretrained(str(small_checkpoint))
    out = processor.process("What is it?", [IMAGE])
    expected = preprocess(IMAGE, ImageTokenIds.from_vocab(processor.tokenizer.get_vocab()))
    text = processor.tokenizer.encode(" User: What is it? Assistant:", add_special_tokens=False)
    bos = processor.tokenizer.eos_token_id
    assert out["input_ids"].tolist() == sequence(expected, text, bos).tolist()
    assert np.array_equal(out["image_input_idx"].numpy(), expected.image_input_idx)
    assert np.array_equal(out["image_masks"].numpy(), expected.image_masks)
    assert np.abs(out["images"].numpy() - expected.images).max() <= 1e-3
    dtypes = {"images": torch.float32, "image_masks": torch.float32}
    dtypes |= {"image_input_idx": torch.int32, "input_ids": torch.int64}
    assert {name: tensor.dtype for name, tensor in out.items()} == dtypes
    assert set(processor.process("Hello")) == {"input_ids"}
    with pytest.raises(ImageError, match="single images"):
        processor.process("x", [IMAGE, IMAGE])


def test_a_null_number_of_kv_heads_means_all(small_checkpoint: Path) -> None:
    config = read_config(small_checkpoint)
    made = MolmoConfig(**{**config, "num_key_value_heads": None, "rope_theta": 500000.0})
    assert made.num_key_value_heads == made.num_attention_heads
    assert made.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_tying": True}, "weight_tying"),
        ({"layer_norm_type": "default"}, "layer_norm_type"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"norm_after": True}, "released layout"),
        ({"moe_num_experts": 64}, "moe_num_experts"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_other_layouts_are_refused_with_the_supported_ones(
    small_checkpoint: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        MolmoConfig(**{**read_config(small_checkpoint), **change})
    assert "Molmo-7B-O-0924" in str(caught.value)


def test_a_tokenizer_without_image_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="<im_patch>"):
        ImageTokenIds.from_vocab({"<im_start>": 1})
