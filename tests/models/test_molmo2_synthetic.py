"""Molmo 2's inventory of tensors and the checkpoints with random weights."""

from __future__ import annotations

import math

import pytest

from molmo_edge.devices.tensors import KNOWN, molmo2_tensor_shapes
from tests import molmo2_golden


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


@pytest.mark.parametrize("variant", molmo2_golden.VARIANTS)
def test_the_tokenizer_gives_the_ids_of_the_reference(
    variant: molmo2_golden.Variant, golden_checkpoint
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(golden_checkpoint(variant) / "tokenizer.json"))
    for case in molmo2_golden.cases(variant):
        if not case.get("images") and not case.get("video"):
            assert tokenizer.encode(case["prompt"]).ids == case["prompt_token_ids"][1:]
