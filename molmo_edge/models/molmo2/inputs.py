"""Images or a video of one request as vLLM's input: one multimodal item, whatever their number.

All image tokens of a prompt see each other, so what is computed for the first image depends on the
last: vLLM must neither cache nor schedule them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from vllm.inputs.engine import mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

from molmo_edge.models.molmo2.config import ImageIds
from molmo_edge.models.molmo2.image_processor import frame_patches, image_patches
from molmo_edge.models.molmo2.tiling import Geometry, Tiling

Pixels = npt.NDArray[np.uint8]
Modality = Literal["image", "video"]

# Frames that the vision tower computes at once: its memory does not grow with the video.
FRAMES_AT_ONCE = 8


@dataclass(frozen=True)
class Visuals:
    """All images, or the frames, of one request.

    The vision tower computes a group of crops at once: an image's, or `FRAMES_AT_ONCE` frames.
    """

    patches: npt.NDArray[np.float32]  # (crops, patches, values), see `image_processor`
    # (features, window), indices into all patches of the group, -1 for none.
    pooling: npt.NDArray[np.int64]
    group_sizes: list[tuple[int, int]]  # crops and features of each group


def image_visuals(
    images: Sequence[Pixels], tilings: Sequence[Tiling], *, compiled: bool = True
) -> Visuals:
    """One group for each image."""
    patches = [
        image_patches(pixels, tiling, compiled=compiled).numpy()
        for pixels, tiling in zip(images, tilings, strict=True)
    ]
    pooling = [tiling.pooling for tiling in tilings]
    sizes = [(len(crops), len(windows)) for crops, windows in zip(patches, pooling, strict=True)]
    if len(images) == 1:
        return Visuals(patches[0], pooling[0], sizes)
    # numpy: torch would start a pool of threads in the caller's, which slows the engine's.
    return Visuals(np.concatenate(patches), np.concatenate(pooling), sizes)


def frame_visuals(
    frames: Sequence[Pixels], geometry: Geometry, *, compiled: bool = True
) -> Visuals:
    """Groups of frames."""
    patches = frame_patches(frames, geometry, compiled=compiled).numpy()
    one, count = geometry.frame_pooling, len(frames)
    shift = np.arange(count)[:, None, None] % FRAMES_AT_ONCE * geometry.n_patches
    pooling = np.where(one < 0, one, one + shift).reshape(-1, one.shape[1])
    lengths = [min(FRAMES_AT_ONCE, count - first) for first in range(0, count, FRAMES_AT_ONCE)]
    return Visuals(patches, pooling, [(length, length * len(one)) for length in lengths])


def engine_input(
    ids: list[int], image_ids: ImageIds, modality: Modality, visuals: Visuals, digest: str
) -> tuple[Any, int]:
    """vLLM's input for a prompt, and the number of image tokens in it.

    Args:
        ids: the whole prompt, BOS first, with all image tokens.
        digest: hash of all images. Text among them is added here: image tokens before it depend
            on it through those behind.

    Raises:
        ValueError: the prompt has not one `<im_patch>` for each feature.
    """
    tokens = np.array(ids, dtype=np.int64)
    is_image = np.isin(tokens, image_ids)
    n_features = len(visuals.pooling)
    if (tokens == image_ids.patch).sum() != n_features:
        raise ValueError(
            f"The prompt must have one <im_patch> for each of the {n_features} image features."
        )
    end = int(np.flatnonzero(is_image)[-1]) + 1
    hashed = f"{digest}-{sha256(tokens[:end].tobytes()).hexdigest()}"
    visual = tokens[is_image]
    data = {
        "pixel_values": torch.from_numpy(visuals.patches),
        "token_pooling": torch.from_numpy(visuals.pooling),
        "visual_tokens": torch.from_numpy(visual),
        "group_sizes": torch.tensor(visuals.group_sizes),
        "num_tokens": torch.tensor([len(visual)]),
    }
    fields = {
        name: MultiModalFieldConfig.flat_from_sizes(
            modality, torch.tensor([len(value)]), keep_on_cpu=name == "group_sizes"
        )
        for name, value in data.items()
    }
    fields["num_tokens"] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
    # From behind BOS, not from the start: vLLM splits no item that begins later than a step.
    place = PlaceholderRange(
        offset=1, length=end - 1, is_embed=torch.from_numpy(is_image[1:end].copy())
    )
    prompt = mm_input(
        prompt_token_ids=ids,
        mm_kwargs=MultiModalKwargsItems.from_hf_inputs(data, fields),
        mm_hashes={modality: [hashed]},
        mm_placeholders={modality: [place]},
    )
    return prompt, len(visual)
