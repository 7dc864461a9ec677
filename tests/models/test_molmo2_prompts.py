"""Molmo 2's conversations, and checkpoints that write them or state their settings otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import molmo_edge
from molmo_edge.errors import ModelError, PromptError
from molmo_edge.interface import Turn
from molmo_edge.models.molmo.family import Molmo
from molmo_edge.models.molmo2.config import Processing, relative
from molmo_edge.models.molmo2.prompts import PromptEncoder, chat_text
from molmo_edge.models.prompts import template_with_bos
from molmo_edge.reference.molmo2_inputs import Molmo2Processor

TURNS = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
SAID = "User: a Assistant: b User: c Assistant:"
# As MolmoWeb writes it; the text of a part, or a content that is a string.
ROLES = (
    "{% for m in messages %}{{ ' ' if not loop.first }}{{ m.role | capitalize }}: {{ TEXT }}"
    "{% endfor %}{{ ' Assistant:' if add_generation_prompt }}"
)
OWN = Path(molmo_edge.__file__).parent / "models" / "demo" / "chat_template.jinja"


@pytest.fixture
def checkpoint(golden_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_checkpoint("qwen3"), tmp_path / "copy"))


@pytest.fixture
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.mark.parametrize("text", ["m.content[0].text", "m.content"])
def test_a_checkpoints_own_form_is_written(checkpoint: Path, text: str) -> None:
    template = ROLES.replace("TEXT", text)
    (checkpoint / "chat_template.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    encoder = PromptEncoder(tokenizer, 2048)
    ids = encoder.encode(TURNS)
    assert (tokenizer.decode(ids), encoder.answer_prefix) == (SAID, " ")
    with pytest.raises(PromptError, match="special tokens"):
        encoder.encode([Turn("user", "a <|im_end|>")])
    if text != "m.content":  # the reference gives parts, as AllenAI's code does
        said = [(turn.role, turn.text) for turn in TURNS]
        assert Molmo2Processor(checkpoint)(said)[0] == [encoder.bos, *ids]


def test_molmo_2s_own_template_is_what_is_written_without_one(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    without = PromptEncoder(tokenizer, 2048)
    tokenizer.chat_template = OWN.read_text()
    encoder = PromptEncoder(tokenizer, 2048)
    assert encoder.encode(TURNS) == without.encode(TURNS) == encoder.text(chat_text(TURNS))
    assert encoder.answer_prefix == without.answer_prefix == ""


def test_a_template_that_loses_what_is_said_is_refused(tokenizer: Any) -> None:
    for template in ("{{ raise_exception('no') }}", "{{ messages[0].role }}", "{% broken"):
        tokenizer.chat_template = template
        with pytest.raises(ModelError, match="chat template"):
            PromptEncoder(tokenizer, 2048)


def test_a_template_with_bos_gets_no_second_one(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ bos_token }}" + ROLES.replace("TEXT", "m.content[0].text")
    assert template_with_bos(tokenizer.chat_template, "<|endoftext|>") is None
    tokenizer.bos_token = "<|endoftext|>"
    encoder = PromptEncoder(tokenizer, 2048)
    assert tokenizer.decode(encoder.encode(TURNS)) == SAID


def test_settings_as_transformers_5_saves_them(checkpoint: Path) -> None:
    files = {
        "image_processor": checkpoint / "preprocessor_config.json",
        "video_processor": checkpoint / "video_preprocessor_config.json",
    }
    parts = {name: json.loads(path.read_text()) for name, path in files.items()}
    parts["image_processor"]["max_crops"] = 3
    parts["video_processor"]["num_frames"] = 64
    for path in files.values():
        path.unlink()
    whole = checkpoint / "processor_config.json"
    whole.write_text(json.dumps({**json.loads(whole.read_text()), **parts}))
    read = Processing.read(checkpoint)
    assert (read.max_crops, read.max_frames) == (3, 64)
    assert Molmo().default_crops(checkpoint) == 3
    assert Molmo2Processor(checkpoint)._max_crops == 3
    parts["image_processor"]["image_mean"] = [0.4] * 3
    whole.write_text(json.dumps(parts))
    with pytest.raises(ModelError, match="image_mean"):
        Processing.read(checkpoint)


def test_relatives_are_told_apart() -> None:
    for kind, reason in (("molmoact", "another architecture"), ("molmoact2", "flow-matching")):
        assert reason in str(relative({"model_type": kind}))
