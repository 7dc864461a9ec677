"""Images or a video of one request as vLLM's input: one multimodal item, whatever their number.

All image tokens of a prompt see each other, so what is computed for the first image depends on the
last: vLLM must neither cache nor schedule them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
class Group:
    """Crops that the vision tower computes at once, and how their features are pooled.

    Attributes:
        patches: (crops, patches, values) float32, see `image_processor`.
        pooling: (features, window) int64, indices into all patches of the group, -1 for none.
    """

    patches: npt.NDArray[np.float32]
    pooling: npt.NDArray[np.int64]


def image_groups(
    images: Sequence[Pixels], tilings: Sequence[Tiling], *, compiled: bool = True
) -> list[Group]:
    """One group for each image."""
    return [
        Group(image_patches(pixels, tiling, compiled=compiled).numpy(), tiling.pooling)
        for pixels, tiling in zip(images, tilings, strict=True)
    ]


def frame_groups(
    frames: Sequence[Pixels], geometry: Geometry, *, compiled: bool = True
) -> list[Group]:
    """Groups of frames."""

    def groups() -> Iterator[Group]:
        patches = frame_patches(frames, geometry, compiled=compiled).numpy()
        for first in range(0, len(frames), FRAMES_AT_ONCE):
            part = patches[first : first + FRAMES_AT_ONCE]
            shift = np.arange(len(part))[:, None, None] * geometry.n_patches
            one = geometry.frame_pooling
            pooling = np.where(one < 0, one, one + shift).reshape(-1, one.shape[1])
            yield Group(part, pooling)

    return list(groups())


def engine_input(
    ids: list[int], image_ids: ImageIds, modality: Modality, groups: Sequence[Group], digest: str
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
    n_features = sum(len(group.pooling) for group in groups)
    if (tokens == image_ids.patch).sum() != n_features:
        raise ValueError(
            f"The prompt must have one <im_patch> for each of the {n_features} image features."
        )
    end = int(np.flatnonzero(is_image)[-1]) + 1
    hashed = f"{digest}-{sha256(tokens[:end].tobytes()).hexdigest()}"
    visual = tokens[is_image]
    sizes = [[len(group.patches), len(group.pooling)] for group in groups]
    # numpy: torch would start a pool of threads in the caller's, which slows the engine's.
    data = {
        "pixel_values": _joined([group.patches for group in groups]),
        "token_pooling": _joined([group.pooling for group in groups]),
        "visual_tokens": torch.from_numpy(visual),
        "group_sizes": torch.tensor(sizes),
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


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
