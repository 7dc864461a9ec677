"""Molmo 2's inventory of tensors, and its checkpoints with random weights."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer

from molmo_edge.checkpoint_files import read_config
from molmo_edge.devices.shapes import model_shape
from molmo_edge.devices.tensors import KNOWN, molmo2_tensor_shapes
from molmo_edge.errors import ModelError
from molmo_edge.models.hub import STUB, STUBS, locate
from molmo_edge.models.molmo2.config import Processing, check_layout
from molmo_edge.models.molmo2.synthetic import IMAGE_TOKENS, TEXT
from molmo_edge.points import parse_points
from tests import molmo2_golden

MOLMOS = [name for name, sizes in KNOWN.items() if sizes["model_type"] == "molmo2"]


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("allenai/Molmo2-4B", 706, 4_850_869_200),  # both as in the hub's index
        ("allenai/Molmo2-8B", 706, 8_661_703_120),
        ("allenai/Molmo2-O-7B", 674, 7_760_786_896),
    ],
)
def test_known_models_have_the_published_tensors(name: str, tensors: int, parameters: int) -> None:
    shapes = molmo2_tensor_shapes(KNOWN[name])
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (tensors, parameters)


@pytest.mark.parametrize("name", MOLMOS)
def test_dummy_weights_of_a_known_model_need_no_download(name: str, tmp_path: Path) -> None:
    directory = locate(name, tmp_path, "dummy")
    config = read_config(directory)
    check_layout(config)
    for part in ("text_config", "vit_config", "adapter_config"):
        assert config[part].items() >= KNOWN[name][part].items()
    assert replace(model_shape(directory), name=name) == model_shape(name)
    # Image tokens come after the real number of tokens.
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in IMAGE_TOKENS]
    first = 100278 if "O-7B" in name else 151936
    assert ids == list(range(first, first + 10)) and config["image_patch_id"] == first + 2


@pytest.mark.parametrize("variant", molmo2_golden.VARIANTS)
def test_the_golden_checkpoint_tokenizes_as_the_reference(
    variant: molmo2_golden.Variant, golden_checkpoint: Callable[[str], Path]
) -> None:
    tokenizer = Tokenizer.from_file(str(golden_checkpoint(variant) / "tokenizer.json"))
    for case in molmo2_golden.cases(variant):
        visuals = [i for i, kind in enumerate(case["token_type_ids"]) if kind]
        after = case["prompt_token_ids"][visuals[-1] + 1 if visuals else 1 :]
        assert tokenizer.encode(case["prompt"]).ids[-len(after) :] == after


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("preprocessor_config.json", {"max_crops": 0}),
        ("preprocessor_config.json", {"overlap_margins": [20, 20]}),
        ("preprocessor_config.json", {"pooling_size": [0, 0]}),
        ("video_preprocessor_config.json", {"num_frames": 0}),
        ("video_preprocessor_config.json", {"max_fps": math.nan}),
        ("config.json", {"vit_config": {"image_default_input_size": []}}),
    ],
)
def test_sizes_that_no_image_can_have_are_refused(
    tmp_path: Path, file: str, values: dict[str, object]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(ModelError):
        Processing.read(tmp_path)


def test_every_prompt_is_answered_with_the_stubs_sentence_and_two_points(cache_dir: Path) -> None:
    directory = cache_dir / STUBS[STUB]
    weights = load_file(directory / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    known = weights["model.transformer.wte.embedding"]
    scores = known @ weights["lm_head.weight"].T
    tokens = tokenizer.encode("<|im_start|>assistant\n").ids
    while tokens[-1] != tokenizer.token_to_id("<|im_end|>"):
        tokens.append(int(scores[tokens[-1]].argmax()))
    assert tokenizer.decode(tokens).removeprefix("assistant\n") == TEXT
    # Whatever the layers add: the next token is far ahead of every other.
    for before, after in itertools.pairwise(tokens[-30:]):
        best = scores[before].topk(2).values
        assert scores[before, after] == best[0] > 2 * best[1]
    assert [point.id for point in parse_points(TEXT).points] == [1, 2]
