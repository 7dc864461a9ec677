"""What vLLM's own Molmo 2 asks of transformers, for `verify --stock` without remote code.

The checkpoint's processor is Python code from the hub, which molmo_edge never runs. In its place
stands this class with molmo_edge's own pixels, pooling windows and settings, which equal AllenAI's;
the layout of the tokens, frames' times, embeddings and attention are vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin
from vllm.plugins import load_general_plugins

from molmo_edge.checkpoint_files import read_json
from molmo_edge.models.molmo2.config import Processing
from molmo_edge.models.molmo2.hf import Molmo2Config
from molmo_edge.models.molmo2.image_processor import frame_patches
from molmo_edge.models.molmo2.inputs import image_visuals


class Molmo2Processor(ProcessorMixin):  # type: ignore[misc]
    """Images or one video to the tensors that vLLM's own Molmo 2 expects."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(directory))
        self._processing = Processing.read(directory)
        self.image_processor = SimpleNamespace(**read_json(directory / "preprocessor_config.json"))
        video = read_json(directory / "video_preprocessor_config.json")
        self.video_processor = SimpleNamespace(**video)
        for name, value in read_json(directory / "processor_config.json").items():
            setattr(self, name, value)

    @classmethod
    def from_pretrained(cls, name: str, **_: Any) -> Molmo2Processor:
        return cls(Path(name))

    def __call__(
        self,
        text: str = "",
        images: Sequence[Any] | None = None,
        videos: Sequence[Sequence[Any]] | None = None,
        **_: Any,
    ) -> BatchFeature:
        # vLLM builds the prompt's tokens itself.
        data: dict[str, Any] = {"input_ids": torch.tensor([[self.tokenizer.bos_token_id]])}
        geometry = self._processing.geometry
        if images:
            pixels = [np.asarray(image) for image in images]
            max_crops = self._processing.max_crops
            tilings = [geometry.tiling(len(i), i.shape[1], max_crops) for i in pixels]
            visuals = image_visuals(pixels, tilings, compiled=False)
            patches, pooling = visuals.patches, visuals.pooling
            grids = [[*tiling.base_grid, *tiling.grid] for tiling in tilings]
            data["image_num_crops"] = torch.tensor([tiling.n_crops for tiling in tilings])
            names = ("pixel_values", "image_token_pooling", "image_grids")
        elif videos:
            [[frames]] = videos
            patches = frame_patches(frames, geometry, compiled=False).numpy()
            one, first = geometry.frame_pooling, np.arange(len(frames)) * geometry.n_patches
            pooling = np.where(one < 0, -1, one + first[:, None, None]).reshape(-1, one.shape[1])
            grids = [[len(frames), *geometry.frame_grid]]
            names = ("pixel_values_videos", "video_token_pooling", "video_grids")
        else:
            return BatchFeature(data)
        tensors = (torch.from_numpy(patches), torch.from_numpy(pooling), torch.tensor(grids))
        return BatchFeature({**data, **dict(zip(names, tensors, strict=True))})


def register() -> None:
    """Make transformers, and so vLLM, read a Molmo 2's processor with this class."""
    load_general_plugins()  # runs once per process, and registers the processor: not after this one
    AutoProcessor.register(Molmo2Config, Molmo2Processor, exist_ok=True)
