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

_FAMILIES: Mapping[str, ModelFamily] = {
    "molmo": Molmo(),
    "gemma3": Gemma3(),
}


def family_of(config: Mapping[str, Any]) -> ModelFamily:
    """Return the family of a `config.json`. Raises ModelError for an unsupported model."""
    model_type = config.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"Model type '{model_type}' is not supported. {SUPPORTED} Gemma 3 with vision "
            "(gemma3) is supported too."
        )
    return family
