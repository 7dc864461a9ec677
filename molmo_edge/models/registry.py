"""Model families by the `model_type` of `config.json`, which is also their name.

Another model of vLLM's takes one module here and one line below; its sizes, for plans, go to
`molmo_edge.devices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molmo_edge.errors import ModelError
from molmo_edge.interface import ModelFamily
from molmo_edge.models.gemma3 import Gemma3
from molmo_edge.models.molmo.config import SUPPORTED
from molmo_edge.models.molmo.family import Molmo
from molmo_edge.models.molmo2 import config as molmo2
from molmo_edge.models.molmo2.family import Molmo2

_FAMILIES: Mapping[str, ModelFamily] = {"molmo": Molmo(), "molmo2": Molmo2(), "gemma3": Gemma3()}


def family_of(config: Mapping[str, Any]) -> ModelFamily:
    """Return the family of a `config.json`. Raises ModelError for an unsupported model."""
    if refusal := molmo2.relative(config):
        raise ModelError(refusal)
    model_type = config.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"Model type '{model_type}' is not supported. {SUPPORTED} {molmo2.SUPPORTED} Gemma 3 "
            "with vision (gemma3) is supported too."
        )
    return family
