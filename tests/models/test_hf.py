"""Config, image processor and processor read the hub's files, and never run code from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from molmo_edge.errors import ImageError, ModelError
from molmo_edge.models.molmo.hf import MolmoConfig, MolmoProcessor
from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
from molmo_edge.models.molmo.prompts import ImageTokenIds
from molmo_edge.reference import molmo as reference

IMAGE = np.random.default_rng(0).integers(0, 256, (150, 400, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor(small_checkpoint: Path) -> MolmoProcessor:
    return AutoProcessor.from_pretrained(small_checkpoint)


def test_the_auto_classes_find_ours(small_checkpoint: Path, processor: MolmoProcessor) -> None:
    assert isinstance(processor, MolmoProcessor)
    assert isinstance(AutoConfig.from_pretrained(small_checkpoint), MolmoConfig)
    images = AutoImageProcessor.from_pretrained(small_checkpoint)
    assert isinstance(images, MolmoImageProcessor)
    assert images.max_crops == 12


def test_code_beside_a_checkpoint_is_not_executed(small_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trapped"
    shutil.copytree(small_checkpoint, folder)
    witness = tmp_path / "executed"
    trap = f"open({str(witness)!r}, 'w').close()\n"
    for name in (
        "config_molmo",
        "modeling_molmo",
        "preprocessing_molmo",
        "image_preprocessing_molmo",
    ):
        (folder / f"{name}.py").write_text(trap)
    AutoConfig.from_pretrained(folder)
    AutoImageProcessor.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert not witness.exists()


def test_the_whole_sequence_equals_the_references(processor: MolmoProcessor) -> None:
    ids = ImageTokenIds.from_vocab(processor.tokenizer.get_vocab())
    special = reference.SpecialTokens(ids.start, ids.end, ids.patch, ids.col)
    out = processor.process("What is it?", IMAGE)
    slow = reference.preprocess(IMAGE, special)
    text = processor.tokenizer.encode(" User: What is it? Assistant:", add_special_tokens=False)
    bos = processor.tokenizer.eos_token_id
    assert out["input_ids"].tolist() == reference.sequence(slow, text, bos).tolist()
    assert np.array_equal(out["image_input_idx"].numpy(), slow.image_input_idx)
    assert np.array_equal(out["image_masks"].numpy(), slow.image_masks)
    assert np.abs(out["images"].numpy() - slow.images).max() <= 1e-3


def test_text_alone_has_no_image_arrays(processor: MolmoProcessor) -> None:
    out = processor.process("Hello")
    assert set(out) == {"input_ids"}
    assert out["input_ids"][0] == processor.bos_token_id


def test_max_crops_of_one_call_is_honoured(processor: MolmoProcessor) -> None:
    big = np.zeros((900, 1200, 3), np.uint8)
    assert len(processor.process("x", big)["images"]) == 13
    assert len(processor.process("x", big, max_crops=2)["images"]) == 3
    assert len(processor.process("x", big)["images"]) == 13


def test_two_images_are_refused_and_the_reason_given(processor: MolmoProcessor) -> None:
    with pytest.raises(ImageError, match="single images"):
        processor.process("x", [IMAGE, IMAGE])


def test_a_null_number_of_kv_heads_means_all(small_checkpoint: Path) -> None:
    config = json.loads((small_checkpoint / "config.json").read_text())
    config.update(num_key_value_heads=None, rope_theta=500000.0)
    made = MolmoConfig(**config)
    assert made.num_key_value_heads == made.num_attention_heads
    assert made.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_tying": True}, "weight_tying"),
        ({"layer_norm_type": "default"}, "layer_norm_type"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"norm_after": True}, "released layout"),
        ({"moe_num_experts": 64}, "moe_num_experts"),
    ],
)
def test_other_layouts_are_refused_with_what_works(
    small_checkpoint: Path, change: dict[str, Any], said: str
) -> None:
    config = json.loads((small_checkpoint / "config.json").read_text())
    with pytest.raises(ModelError, match=said) as caught:
        MolmoConfig(**{**config, **change})
    assert "Molmo-7B-O-0924" in str(caught.value)


def test_a_tokenizer_without_image_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="<im_patch>"):
        ImageTokenIds.from_vocab({"<im_start>": 1})


def test_arrays_are_torch_tensors_of_the_stated_types(processor: MolmoProcessor) -> None:
    out = processor.process("x", IMAGE)
    assert out["images"].dtype == torch.float32
    assert out["image_masks"].dtype == torch.float32
    assert out["image_input_idx"].dtype == torch.int32
    assert out["input_ids"].dtype == torch.int64
