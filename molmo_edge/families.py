"""Model families: what differs between the models that `EdgeVLM` runs.

A family says how turns become engine input, how many pictures a request may hold, what verbs make
sense, and which `vllm.LLM` arguments it needs. Another vLLM-supported model takes one more class.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from molmo_edge.engine.seam import Rendered, Turn
from molmo_edge.errors import ModelError
from molmo_edge.molmo.layout import SUPPORTED, check_layout, check_weights


class Renderer(Protocol):
    """Turns to engine input, in any thread."""

    def render(self, turns: Any, options: Mapping[str, Any]) -> Rendered:
        """See `Engine.render`."""
        ...


class Family(Protocol):
    """One model family; without state."""

    name: str
    verbs: frozenset[str]

    def check(self, config: Mapping[str, Any], folder: Path, load_format: str) -> None:
        """Raises ModelError for a checkpoint that this family cannot run."""
        ...

    def engine_args(self, max_crops: int, resize: str) -> dict[str, Any]:
        """Arguments of `vllm.LLM` that the family needs."""
        ...

    def renderer(self, llm: Any, max_crops: int, resize: str) -> Renderer:
        """Built in the engine's thread, used in every other."""
        ...


class Molmo:
    """AllenAI's Molmo 1 (7B-D, 7B-O, 72B)."""

    name = "molmo"
    verbs = frozenset({"query", "chat", "caption", "point", "count"})

    def check(self, config: Mapping[str, Any], folder: Path, load_format: str) -> None:
        check_layout(config)
        if load_format != "dummy":
            check_weights(folder)

    def engine_args(self, max_crops: int, resize: str) -> dict[str, Any]:
        return {
            "mm_processor_kwargs": {"max_crops": max_crops, "resize": resize},
            "limit_mm_per_prompt": {"image": 1},
        }

    def renderer(self, llm: Any, max_crops: int, resize: str) -> Renderer:
        from molmo_edge.molmo.image_processor import MolmoImageProcessor
        from molmo_edge.molmo.render import MolmoRenderer

        config = {
            key: value
            for key, value in llm.llm_engine.model_config.hf_image_processor_config.items()
            if key not in ("auto_map", "image_processor_type", "processor_class", "max_crops")
        }
        processor = MolmoImageProcessor(max_crops=max_crops, resize=resize, **config)
        return MolmoRenderer(llm, processor)


_FAMILIES: Mapping[str, Family] = {"molmo": Molmo()}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`. Raises ModelError when none runs it."""
    model_type = config.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(f"Model type '{model_type}' is not supported. {SUPPORTED}")
    return family
