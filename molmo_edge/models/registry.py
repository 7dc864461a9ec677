"""Model families: what differs between the models that `EdgeVLM` runs.

A family says how turns become engine input, how many pictures a request may hold, what verbs make
sense, and which `vllm.LLM` arguments it needs. Another vLLM-supported model takes one more file
here, and one more line below; its sizes, for plans, go to `molmo_edge.devices.model_configs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molmo_edge.errors import ModelError
from molmo_edge.interface import ModelFamily
from molmo_edge.models.gemma3 import Gemma3, Gemma3Text
from molmo_edge.models.molmo.family import Molmo
from molmo_edge.models.molmo.layout import SUPPORTED

__all__ = ["by_name", "family_of"]

# By the `model_type` of config.json.
_FAMILIES: Mapping[str, ModelFamily] = {
    "molmo": Molmo(),
    "gemma3": Gemma3(),
    "gemma3_text": Gemma3Text(),
}


def family_of(config: Mapping[str, Any]) -> ModelFamily:
    """The family of a `config.json`. Raises ModelError when none runs it."""
    model_type = config.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"Model type '{model_type}' is not supported. {SUPPORTED} Gemma 3 (gemma3, "
            "gemma3_text) runs too."
        )
    return family


def by_name(name: str) -> ModelFamily:
    """The family of a `ModelFamily.name`, which must exist."""
    return next(family for family in _FAMILIES.values() if family.name == name)
