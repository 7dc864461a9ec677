"""Molmo 1's image processor for transformers 5: RGB image to normalised patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from molmo_edge.errors import ConfigError, ImageError, MissingDependencyError
from molmo_edge.interface import Resize
from molmo_edge.models.molmo.resize import available, write_patches
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

# CLIP's, from the OpenAI checkpoint that Molmo's tower was started from.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# The model's geometry is fixed; a preprocessor_config.json that says otherwise is refused.
_FIXED: Mapping[str, object] = {
    "overlap_margins": [MARGIN_PATCHES, MARGIN_PATCHES],
    "base_image_input_size": [CROP_PX, CROP_PX],
    "image_token_length_w": CROP_FEATURES,
    "image_token_length_h": CROP_FEATURES,
    "image_patch_size": PATCH_PX,
    "image_padding_mask": True,
    "do_normalize": True,
}
_NAMES_OF_CODE = frozenset({"auto_map", "image_processor_type", "processor_class"})


@dataclass(frozen=True)
class ImageInputs:
    """One preprocessed image.

    Attributes:
        images: (n_crops + 1, 576, 588) float32, normalised patch pixels in (row, column, channel)
            order; the global view first.
        image_masks: (n_crops + 1, 576) float32, fraction of each patch that is image; grid crops
            first and the last row -1, as the reference pads it.
        tiling: tokens and positions.
    """

    images: torch.Tensor
    image_masks: torch.Tensor
    tiling: Tiling


class MolmoImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Reads the hub's `preprocessor_config.json`.

    Args:
        max_crops: maximum crops of the grid, 12 in the released checkpoints.
        resize: ``"torch"`` (float32, within 5e-4 of TensorFlow's in normalised units; compiled for
            this CPU with numba, torch's own kernel without it) or ``"tensorflow"`` (what the model
            was trained with; needs the extra ``tf``).
    """

    model_input_names = ["images", "image_masks", "image_input_idx"]  # noqa: RUF012

    def __init__(
        self,
        max_crops: int = DEFAULT_MAX_CROPS,
        resize: Resize = "torch",
        image_mean: tuple[float, ...] | None = None,
        image_std: tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, expected in _FIXED.items():
            given = kwargs.pop(name, expected)
            given = list(given) if isinstance(given, tuple) else given
            if isinstance(expected, list) and isinstance(given, int):
                given = [given, given]
            if given != expected:
                raise ConfigError(
                    f"Image processor option {name} must be {expected} for Molmo 1, not {given}."
                )
            setattr(self, name, expected)
        super().__init__(**kwargs)
        if isinstance(max_crops, bool) or not isinstance(max_crops, int) or max_crops < 1:
            raise ConfigError(f"max_crops must be an integer of at least 1, not {max_crops}.")
        if resize not in get_args(Resize):
            raise ConfigError(
                f"resize must be one of {', '.join(get_args(Resize))}, not '{resize}'."
            )
        self.max_crops = max_crops
        self.resize = resize
        self.image_mean = list(image_mean or MEAN)
        self.image_std = list(image_std or STD)

    def inputs(
        self, image: Image.Image | npt.NDArray[np.uint8], *, compiled: bool = True
    ) -> ImageInputs:
        """Convert one RGB image (PIL, or H×W×3 uint8) to patches.

        Args:
            compiled: use numba where there is one; otherwise torch, several times slower.

        Raises ImageError for other arrays.
        """
        pixels = _pixels(image)
        height, width = pixels.shape[:2]
        tiling = tiling_for(height, width, self.max_crops)
        views = [Tiling(1, 1).fit(height, width), tiling.fit(height, width)]
        images = torch.empty(
            (tiling.n_crops + 1, CROP_PATCHES * CROP_PATCHES, PATCH_PX * PATCH_PX * 3)
        )
        outputs = [images[:1], images[1:]]
        if self.resize == "torch" and compiled and available():
            write_patches(
                pixels,
                [(view, out.numpy()) for view, out in zip(views, outputs, strict=True)],
                self.image_mean,
                self.image_std,
                torch.get_num_threads(),
            )
        else:
            scale = _resize_by_tensorflow if self.resize == "tensorflow" else _resize_by_torch
            for view, out in zip(views, outputs, strict=True):
                self._cut(scale(pixels, (view.height, view.width)), view, out)
        masks = torch.full((tiling.n_crops + 1, CROP_PATCHES * CROP_PATCHES), -1.0)
        masks[:-1] = _mask(views[1])
        return ImageInputs(images, masks, tiling)

    def preprocess(
        self, images: Any, *, max_crops: int | None = None, resize: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """transformers' interface: one image (or a list of one) to the three model inputs.

        `image_input_idx` counts from the first image token; a processor adds what stands before.
        """
        image = images[0] if isinstance(images, list | tuple) and len(images) == 1 else images
        inputs = self.with_options(max_crops=max_crops, resize=resize).inputs(image)
        return BatchFeature(
            {
                "images": inputs.images,
                "image_masks": inputs.image_masks,
                "image_input_idx": torch.from_numpy(inputs.tiling.input_idx),
            }
        )

    __call__ = preprocess

    def with_options(
        self, *, max_crops: int | None = None, resize: Resize | None = None
    ) -> MolmoImageProcessor:
        """Return itself, or a copy with these options for one request."""
        if max_crops in (None, self.max_crops) and resize in (None, self.resize):
            return self
        return MolmoImageProcessor(
            max_crops=self.max_crops if max_crops is None else max_crops,
            resize=resize or self.resize,
            image_mean=tuple(self.image_mean),
            image_std=tuple(self.image_std),
        )

    def _cut(self, scaled: torch.Tensor, view: View, out: torch.Tensor) -> None:
        """Write a resized image, (height, width, 3) in 0..1, as normalised patches of crops."""
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
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


def processor_of(config: Mapping[str, Any], **options: Any) -> MolmoImageProcessor:
    """Return the processor that a `preprocessor_config.json` describes; options override it.

    Code that it names (`auto_map`) is not followed. Raises ConfigError.
    """
    described = {name: value for name, value in config.items() if name not in _NAMES_OF_CODE}
    return MolmoImageProcessor(**{**described, **options})


def _pixels(image: Image.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        image = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if isinstance(image, torch.Tensor):
        image = image.numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ImageError("The image must be a PIL image or an array of uint8.")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(f"The image must have shape height × width × 3, not {image.shape}.")
    return image


def _resize_by_torch(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> torch.Tensor:
    """Bilinear with antialias, (height, width, 3) float32 in 0..1."""
    owned = pixels.flags.writeable and pixels.flags.c_contiguous
    source = torch.from_numpy(pixels if owned else pixels.copy()).permute(2, 0, 1).unsqueeze(0)
    # A channels-last view: the resize kernel vectorises over it.
    source = source.to(torch.float32, memory_format=torch.channels_last)
    # torch 2.13's kernel repeats the first row when the output is one column wide: transpose it.
    narrow = size[1] == 1
    if narrow:
        source, size = source.transpose(2, 3), (size[1], size[0])
    scaled = F.interpolate(source, size=size, mode="bilinear", antialias=True, align_corners=False)
    if narrow:
        scaled = scaled.transpose(2, 3)
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


def _mask(view: View) -> torch.Tensor:
    """Fraction of each patch that is image, (n_crops, 576): the image is one rectangle."""

    def covered(start: int, length: int, crops: int) -> npt.NDArray[np.int64]:
        edge = (
            np.arange(crops)[:, None] * STRIDE_PX + np.arange(CROP_PATCHES)[None, :] * PATCH_PX
        )
        inside = np.minimum(edge + PATCH_PX, start + length) - np.maximum(edge, start)
        pixels: npt.NDArray[np.int64] = np.maximum(inside, 0)
        return pixels

    down = covered(view.top, view.height, view.rows)
    across = covered(view.left, view.width, view.cols)
    area = down[:, None, :, None] * across[None, :, None, :]
    fraction = area.astype(np.float32) / np.float32(PATCH_PX * PATCH_PX)
    return torch.from_numpy(fraction.reshape(view.rows * view.cols, -1))
