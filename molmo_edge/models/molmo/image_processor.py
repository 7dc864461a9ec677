"""Molmo 1's image processor: RGB image to normalised patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from molmo_edge.errors import ConfigError, ImageError, MissingDependencyError
from molmo_edge.interface import Resize
from molmo_edge.models.compiled import compiled_kernel
from molmo_edge.models.molmo.resize import MEAN, STD, filter_rows, write_patches
from molmo_edge.models.molmo.tiling import (
    CROP_FEATURES,
    CROP_PATCHES,
    CROP_PX,
    DEFAULT_MAX_CROPS,
    MARGIN_PATCHES,
    PATCH_PX,
    STRIDE_PX,
    Tiling,
    View,
    tiling_for,
)

# What the model was made for; a preprocessor_config.json that says otherwise is refused.
FIXED: Mapping[str, Any] = {
    "overlap_margins": [MARGIN_PATCHES, MARGIN_PATCHES],
    "base_image_input_size": [CROP_PX, CROP_PX],
    "image_token_length_w": CROP_FEATURES,
    "image_token_length_h": CROP_FEATURES,
    "image_patch_size": PATCH_PX,
    "image_padding_mask": True,
    "do_normalize": True,
    "image_mean": list(MEAN),
    "image_std": list(STD),
}


@dataclass(frozen=True)
class ImageInputs:
    """One preprocessed image."""

    # (n_crops + 1, 576, 588) float32, normalised patch pixels in (row, column, channel) order; the
    # global view first.
    images: torch.Tensor
    # (n_crops + 1, 576) float32, fraction of each patch that is image; grid crops first and the
    # last row -1, as the reference pads it.
    image_masks: torch.Tensor
    tiling: Tiling  # tokens and positions

    def for_vllm(self, patch_id: int) -> dict[str, torch.Tensor]:
        """The image's inputs of vLLM's model; `patch_id` is the token `<im_patch>`.

        Float32: the model casts. A cast in the caller's thread would start an OpenMP pool, which
        halves the engine's speed on a CPU.
        """
        return {
            "images": self.images,
            "image_masks": self.image_masks,
            # Only the order of positions counts, not where the image stands.
            "image_input_idx": torch.from_numpy(self.tiling.input_idx),
            "num_crops": torch.tensor([len(self.images)]),
            "img_patch_id": torch.tensor(patch_id),
        }


@dataclass(frozen=True)
class MolmoImageProcessor:
    """The options of a `preprocessor_config.json`. Raises ConfigError for unusable ones.

    Args:
        max_crops: maximum crops of the grid, 12 in the released checkpoints.
        resize: ``"torch"`` (float32, within 5e-4 of TensorFlow's in normalised units; compiled for
            this CPU with numba, torch's own kernel without it) or ``"tensorflow"`` (what the model
            was trained with; needs the extra ``tf``).
    """

    max_crops: int = DEFAULT_MAX_CROPS
    resize: Resize = "torch"
    # vLLM's own Molmo reads the geometry here.
    overlap_margins: ClassVar[list[int]] = FIXED["overlap_margins"]
    base_image_input_size: ClassVar[list[int]] = FIXED["base_image_input_size"]
    image_token_length_w: ClassVar[int] = CROP_FEATURES
    image_token_length_h: ClassVar[int] = CROP_FEATURES
    image_patch_size: ClassVar[int] = PATCH_PX

    def __post_init__(self) -> None:
        if type(self.max_crops) is not int or self.max_crops < 1:
            raise ConfigError(f"max_crops must be an integer of at least 1, not {self.max_crops}.")
        if self.resize not in get_args(Resize):
            choices = ", ".join(get_args(Resize))
            raise ConfigError(f"resize must be one of {choices}, not '{self.resize}'.")

    def inputs(
        self, image: Image.Image | npt.NDArray[np.uint8], *, compiled: bool = True
    ) -> ImageInputs:
        """Convert one RGB image (PIL, or H×W×3 uint8) to patches. Raises ImageError for others.

        Without `compiled`, or numba, torch does it, several times slower.
        """
        pixels = _pixels(image)
        height, width = pixels.shape[:2]
        tiling = tiling_for(height, width, self.max_crops)
        views = [Tiling(1, 1).fit(height, width), tiling.fit(height, width)]
        images = torch.empty((tiling.n_crops + 1, CROP_PATCHES**2, PATCH_PX**2 * 3))
        outputs = [images[:1], images[1:]]
        kernel = compiled_kernel(filter_rows) if self.resize == "torch" and compiled else None
        if kernel is not None:
            arrays = [(view, out.numpy()) for view, out in zip(views, outputs, strict=True)]
            write_patches(kernel, pixels, arrays, torch.get_num_threads())
        else:
            scale = _resize_by_tensorflow if self.resize == "tensorflow" else _resize_by_torch
            for view, out in zip(views, outputs, strict=True):
                _cut(scale(pixels, (view.height, view.width)), view, out)
        masks = torch.full((tiling.n_crops + 1, CROP_PATCHES**2), -1.0)
        masks[:-1] = _mask(views[1])
        return ImageInputs(images, masks, tiling)


def processor_of(config: Mapping[str, Any], **options: Any) -> MolmoImageProcessor:
    """Return the processor that a `preprocessor_config.json` describes; options override it.

    Code that it names (`auto_map`) is not followed. Raises ConfigError.
    """
    for name, expected in FIXED.items():
        given = config.get(name, expected)
        if given != expected and [given] * 2 != expected:  # one number for both sides
            raise ConfigError(
                f"Image processor option {name} must be {expected} for Molmo 1, not {given}."
            )
    stated = {"max_crops": config.get("max_crops", DEFAULT_MAX_CROPS)}
    return MolmoImageProcessor(**{**stated, **options})


def _pixels(image: Image.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, torch.Tensor):  # vLLM's form of an array
        image = image.numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ImageError("The image must be a PIL image or an array of uint8.")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(f"The image must have shape height × width × 3, not {image.shape}.")
    return image


def _resize_by_torch(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> torch.Tensor:
    """Bilinear with antialias, (height, width, 3) float32 in 0..1."""
    # A channels-last view: the resize kernel vectorises over it.
    source = torch.from_numpy(pixels.astype(np.float32, order="C")).permute(2, 0, 1).unsqueeze(0)
    # torch 2.13's kernel repeats the first row when the output is one column wide: transpose it.
    narrow = size[1] == 1
    if narrow:
        source, size = source.mT, (size[1], size[0])
    scaled = F.interpolate(source, size=size, mode="bilinear", antialias=True)
    if narrow:
        scaled = scaled.mT
    return scaled.squeeze(0).permute(1, 2, 0).div_(255.0).clamp_(0.0, 1.0)


def _resize_by_tensorflow(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> torch.Tensor:
    """The same with the resize that the model was trained with."""
    try:
        import tensorflow as tf
    except ImportError as exc:
        raise MissingDependencyError(
            'resize="tensorflow" needs TensorFlow: pip install "molmo-edge[tf]".'
        ) from exc
    source = tf.image.convert_image_dtype(tf.constant(pixels), dtype=tf.float32)
    scaled = tf.image.resize(source, size, method="bilinear", antialias=True)
    return torch.from_numpy(tf.clip_by_value(scaled, 0.0, 1.0).numpy().copy())


def _cut(scaled: torch.Tensor, view: View, out: torch.Tensor) -> None:
    """Write a resized image, (height, width, 3) in 0..1, as normalised patches of crops."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    shape = Tiling(view.rows, view.cols).canvas_px
    # Padding is 0 before normalising.
    canvas = (-mean / std).repeat(*shape, 1)
    inside = canvas[view.top : view.top + view.height, view.left : view.left + view.width]
    torch.sub(scaled, mean, out=inside).div_(std)
    line = shape[1] * 3
    crops = canvas.as_strided(
        (view.rows, view.cols, CROP_PATCHES, CROP_PATCHES, PATCH_PX, PATCH_PX, 3),
        (STRIDE_PX * line, STRIDE_PX * 3, PATCH_PX * line, PATCH_PX * 3, line, 3, 1),
    )
    out.view(crops.shape).copy_(crops)


def _mask(view: View) -> torch.Tensor:
    """Fraction of each patch that is image, (n_crops, 576): the image is one rectangle."""

    def covered(start: int, length: int, crops: int) -> npt.NDArray[np.int64]:
        """Pixels of the image along each patch, (crops, 24)."""
        first = np.arange(crops)[:, None] * STRIDE_PX + np.arange(CROP_PATCHES) * PATCH_PX
        end = np.minimum(first + PATCH_PX, start + length)
        pixels: npt.NDArray[np.int64] = np.maximum(end - np.maximum(first, start), 0)
        return pixels

    down = covered(view.top, view.height, view.rows)
    across = covered(view.left, view.width, view.cols)
    area = down[:, None, :, None] * across[None, :, None, :]
    fraction = area.astype(np.float32) / np.float32(PATCH_PX * PATCH_PX)
    return torch.from_numpy(fraction.reshape(view.rows * view.cols, -1))
