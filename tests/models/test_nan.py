"""Rows of logits that are not numbers yield a token that nothing else yields."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from molmo_edge.models.nan import checked_logits, nan_token


@pytest.mark.parametrize(
    ("model_type", "sizes", "extra"),
    [
        ("molmo", {"vocab_size": 5, "embedding_size": 8}, 128),
        ("molmo2", {"text_config": PretrainedConfig(vocab_size=8, additional_vocab_size=16)}, 16),
        ("gemma3", {"text_config": PretrainedConfig(vocab_size=8)}, 0),
    ],
)
def test_rows_with_nan_or_infinity_sample_the_last_token_and_others_stay(
    model_type: str, sizes: dict[str, Any], extra: int
) -> None:
    config = PretrainedConfig(**sizes)
    config.model_type = model_type
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    healthy = logits[:2].clone()
    logits[2, 3], logits[3], logits[4, 0] = torch.nan, -torch.inf, torch.inf
    checked = checked_logits(logits, config)
    assert checked.shape == (5, 8 + extra)
    assert torch.equal(checked[:2, :8], healthy)
    assert checked.softmax(-1)[2:, nan_token(config)].tolist() == [1.0] * 3
    # Whatever a grammar or top-p leaves of the others.
    assert (checked[2:, :-1] == -torch.inf).all() and (checked[:2, 8:] == -torch.inf).all()
