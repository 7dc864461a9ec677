"""AllenAI's Molmo 1 as a family; the model itself lives in `molmo_edge.molmo`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molmo_edge.interface import Renderer, Resize
from molmo_edge.models.molmo.layout import check_layout, check_weights


class Molmo:
    """AllenAI's Molmo 1 (7B-D, 7B-O, 72B)."""

    name = "molmo"
    verbs = frozenset({"query", "chat", "caption", "point", "count"})
    # Molmo 1 was trained on single pictures.
    max_images = 1
    crops = True
    unquantized: tuple[str, ...] = ("vision_backbone.*",)

    def check(self, config: Mapping[str, Any], folder: Path, load_format: str) -> None:
        check_layout(config)
        if load_format != "dummy":
            check_weights(folder)

    def engine_args(self, max_crops: int, resize: Resize) -> dict[str, Any]:
        return {
            "mm_processor_kwargs": {"max_crops": max_crops, "resize": resize},
            "limit_mm_per_prompt": {"image": self.max_images},
        }

    def prepare(self) -> None:
        from molmo_edge.vllm_plugin import prepare

        prepare()

    def renderer(self, llm: Any, max_crops: int, resize: Resize) -> Renderer:
        from molmo_edge.models.molmo.image_processor import processor_of
        from molmo_edge.models.molmo.render import MolmoRenderer

        config = llm.llm_engine.model_config.hf_image_processor_config
        return MolmoRenderer(llm, processor_of(config, max_crops=max_crops, resize=resize))
