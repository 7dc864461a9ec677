"""NaN in a model's output: marked in the logits, where looking at it does not wait for the device.

Sampled as it is, NaN looks like an answer: the first token that is allowed, over and over.
"""

from __future__ import annotations

import warnings
from typing import Any

from molmo_edge.devices.tensors import NEW_TOKENS


def checked_logits(logits: Any, config: Any) -> Any:
    """Logits of all tokens that embed; rows without a largest number sample `nan_token`.

    Args:
        logits: tensor (n, tokens), which is changed. Tokens after them, Molmo's image tokens, are
            never generated; without their columns, vLLM's prompt_logprobs and penalties would read
            beyond the last.
        config: vLLM's `hf_config`.
    """
    from torch.nn.functional import pad

    logits = pad(logits, (0, _extra_tokens(config)), value=float("-inf"))
    broken = ~logits.amax(-1, keepdim=True).isfinite()
    logits.masked_fill_(broken, float("-inf"))
    logits[:, -1:].masked_fill_(broken, 0.0)
    return logits


def ignore_bitmask_warning() -> None:
    """Ignore that a grammar's mask has no bits for image tokens, whose logits need none."""
    warnings.filterwarnings("ignore", "The bitmask covers only", UserWarning)


def nan_token(config: Any) -> int:
    """Id of the last row of the embedding, which is none of the tokenizer's."""
    text = getattr(config, "text_config", config)
    tokens = getattr(config, "embedding_size", None) or text.vocab_size
    return int(tokens) + _extra_tokens(config) - 1


def _extra_tokens(config: Any) -> int:
    if config.model_type == "molmo":
        return NEW_TOKENS
    return int(getattr(config.text_config, "additional_vocab_size", 0))
