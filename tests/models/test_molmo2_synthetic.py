"""Molmo 2's checkpoints with random weights."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer

from molmo_edge.errors import ModelError
from molmo_edge.models.hub import STUB, STUBS
from molmo_edge.models.molmo2.config import Processing
from molmo_edge.models.molmo2.synthetic import TEXT
from molmo_edge.points import parse_points
from tests import molmo2_golden


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
