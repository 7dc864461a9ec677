"""Video files at vLLM's server: sampled by time, as `EdgeVLM` does it."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader


@VIDEO_LOADER_REGISTRY.register("molmo_edge", video_processor="Molmo2VideoProcessor")
class VideoFile(VideoLoader):  # type: ignore[misc]
    """Leaves decoding to `Molmo2Inputs`, which knows how many frames the model takes."""

    @classmethod
    def load_bytes(cls, data: bytes, **_: Any) -> tuple[Any, dict[str, Any]]:
        """Return a blank frame, and the file in the metadata."""
        return np.zeros((1, 1, 1, 3), np.uint8), {"file": data}
