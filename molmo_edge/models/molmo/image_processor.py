"""Pictures to patches: Molmo 1's image processor for transformers 5.

Knows nothing of text. The picture arrives as RGB, 8 bits; the caller has checked it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from molmo_edge.errors import ConfigError, ImageError, MissingDependencyError
from molmo_edge.models.molmo.resize import View, available, write_patches
from molmo_edge.models.molmo.tiling import (
    BASE,
    DEFAULT_MAX_CROPS,
    GRID,
    MARGIN,
    PATCH,
    POOLED,
    STRIDE,
    Layout,
    fit,
    layout_for,
    layout_of,
)

Resize = Literal["torch", "tensorflow"]
RESIZES: tuple[Resize, ...] = ("torch", "tensorflow")

# CLIP's, from the OpenAI checkpoint that Molmo's tower was started from.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# The model's geometry is fixed; a preprocessor_config.json that says otherwise is refused.
_FIXED: Mapping[str, object] = {
    "overlap_margins": [MARGIN, MARGIN],
    "base_image_input_size": [BASE, BASE],
    "image_token_length_w": POOLED,
    "image_token_length_h": POOLED,
    "image_patch_size": PATCH,
    "image_padding_mask": True,
    "do_normalize": True,
}
_NAMES_OF_CODE = frozenset({"auto_map", "image_processor_type", "processor_class"})


@dataclass(frozen=True)
class ImageInputs:
    """One preprocessed picture.

    Attributes:
        images: (n_crops + 1, 576, 588) float32, normalised patch pixels in (row, column, channel)
            order; the global view first.
        image_masks: (n_crops + 1, 576) float32, share of each patch that is picture; grid crops
            first and the last row -1, as the reference pads it.
        layout: tokens and positions.
    """

    images: torch.Tensor
    image_masks: torch.Tensor
    layout: Layout


class MolmoImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Reads the hub's `preprocessor_config.json`.

    Args:
        max_crops: most crops of the grid, 12 in the released checkpoints.
        resize: ``"torch"`` (float32, within 5e-4 of TensorFlow's in normalised units; compiled for
            this CPU where numba is, torch's own kernel elsewhere) or ``"tensorflow"`` (what the
            model was trained with; needs the extra ``tf``).
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
            raise ConfigError(f"max_crops must be a whole number of at least 1, not {max_crops}.")
        if resize not in RESIZES:
            raise ConfigError(f"resize must be one of {', '.join(RESIZES)}, not '{resize}'.")
        self.max_crops = max_crops
        self.resize = resize
        self.image_mean = list(image_mean or MEAN)
        self.image_std = list(image_std or STD)

    def layout(self, image: Image.Image | npt.NDArray[np.uint8]) -> Layout:
        """Where the features of an image will go; costs no pixel work."""
        height, width = (
            image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]
        )
        return layout_for(height, width, self.max_crops)

    def inputs(self, image: Image.Image | npt.NDArray[np.uint8]) -> ImageInputs:
        """One RGB image (PIL, or H×W×3 uint8) to patches. Raises ImageError for other arrays."""
        pixels = _pixels(image)
        height, width = pixels.shape[:2]
        layout = layout_for(height, width, self.max_crops)
        views = [
            View(rows, cols, *fit(height, width, canvas))
            for rows, cols, canvas in (
                (1, 1, (BASE, BASE)),
                (layout.rows, layout.cols, layout.pixel_shape),
            )
        ]
        images = torch.empty((layout.n_crops + 1, GRID * GRID, PATCH * PATCH * 3))
        outputs = images[:1], images[1:]
        if self.resize == "torch" and available():
            write_patches(
                pixels,
                [(view, out.numpy()) for view, out in zip(views, outputs, strict=True)],
                self.image_mean,
                self.image_std,
                torch.get_num_threads(),
            )
        else:
            for view, out in zip(views, outputs, strict=True):
                self._lay_down(_resized(pixels, view, self.resize), view, out)
        masks = torch.full((layout.n_crops + 1, GRID * GRID), -1.0)
        masks[:-1] = _mask(views[1], layout)
        return ImageInputs(images, masks, layout)

    def preprocess(
        self,
        images: Any,
        *,
        max_crops: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """transformers' interface: one picture (or a list of one) to the three model inputs.

        `image_input_idx` counts from the first image token; a processor adds what stands before.
        """
        image = images[0] if isinstance(images, list | tuple) and len(images) == 1 else images
        done = self.with_options(max_crops=max_crops, resize=kwargs.get("resize")).inputs(image)
        return BatchFeature(
            {
                "images": done.images,
                "image_masks": done.image_masks,
                "image_input_idx": torch.from_numpy(done.layout.input_idx),
            }
        )

    __call__ = preprocess

    def with_options(
        self, *, max_crops: int | None = None, resize: Resize | None = None
    ) -> MolmoImageProcessor:
        """Itself, or a copy with these options for one request."""
        if max_crops in (None, self.max_crops) and resize in (None, self.resize):
            return self
        return MolmoImageProcessor(
            max_crops=self.max_crops if max_crops is None else max_crops,
            resize=resize or self.resize,
            image_mean=tuple(self.image_mean),
            image_std=tuple(self.image_std),
        )

    def _lay_down(self, scaled: torch.Tensor, view: View, out: torch.Tensor) -> None:
        """A resized picture, (height, width, 3) in 0..1, to normalised patches of crops."""
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        shape = layout_of(view.rows, view.cols).pixel_shape
        # Padding is 0 before normalising.
        canvas = (-mean / std).repeat(*shape, 1)
        inside = canvas[view.top : view.top + view.height, view.left : view.left + view.width]
        torch.sub(scaled, mean, out=inside).div_(std)
        line = shape[1] * 3
        crops = canvas.as_strided(
            (view.rows, view.cols, GRID, GRID, PATCH, PATCH, 3),
            (STRIDE * line, STRIDE * 3, PATCH * line, PATCH * 3, line, 3, 1),
        )
        out.view(crops.shape).copy_(crops)


def processor_of(config: Mapping[str, Any], **options: Any) -> MolmoImageProcessor:
    """The processor that a `preprocessor_config.json` describes; options beat what it says.

    What names code in it (`auto_map`) is not followed. Raises ConfigError.
    """
    described = {name: value for name, value in config.items() if name not in _NAMES_OF_CODE}
    return MolmoImageProcessor(**{**described, **options})


def _pixels(image: Image.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        image = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if isinstance(image, torch.Tensor):
        image = image.numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ImageError("The picture must be a PIL image or an array of uint8.")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(f"The picture must be of shape height × width × 3, not {image.shape}.")
    return image


def _resized(pixels: npt.NDArray[np.uint8], view: View, how: Resize) -> torch.Tensor:
    """Bilinear with antialias, (height, width, 3) float32 in 0..1."""
    size = view.height, view.width
    if how == "tensorflow":
        return _resized_by_tensorflow(pixels, size)
    # A channels-last view: the resize kernels vectorise over it, and no transposed copy is made.
    owned = pixels.flags.writeable and pixels.flags.c_contiguous
    source = torch.from_numpy(pixels if owned else pixels.copy())
    source = source.permute(2, 0, 1).unsqueeze(0)
    source = source.to(torch.float32, memory_format=torch.channels_last)
    # torch 2.13's kernel repeats the first row when the output is one column wide: lay it down.
    narrow = size[1] == 1
    if narrow:
        source, size = source.transpose(2, 3), (size[1], size[0])
    done = F.interpolate(source, size=size, mode="bilinear", antialias=True, align_corners=False)
    if narrow:
        done = done.transpose(2, 3)
    return done.squeeze(0).permute(1, 2, 0).div_(255.0).clamp_(0.0, 1.0)


def _resized_by_tensorflow(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> torch.Tensor:
    try:
        import tensorflow as tf
    except ImportError as exc:
        raise MissingDependencyError(
            'resize="tensorflow" needs TensorFlow: pip install "molmo-edge[tf]".'
        ) from exc
    source = tf.image.convert_image_dtype(tf.constant(pixels), dtype=tf.float32)
    done = tf.image.resize(source, size, method="bilinear", antialias=True)
    return torch.from_numpy(tf.clip_by_value(done, 0.0, 1.0).numpy().copy())


def _mask(view: View, layout: Layout) -> torch.Tensor:
    """Share of each patch that is picture, (n_crops, 576): the picture is one rectangle."""

    def covered(start: int, length: int, crops: int) -> npt.NDArray[np.int64]:
        edge = np.arange(crops)[:, None] * STRIDE + np.arange(GRID)[None, :] * PATCH
        inside = np.minimum(edge + PATCH, start + length) - np.maximum(edge, start)
        covered_pixels: npt.NDArray[np.int64] = np.maximum(inside, 0)
        return covered_pixels

    down = covered(view.top, view.height, layout.rows)
    across = covered(view.left, view.width, layout.cols)
    area = down[:, None, :, None] * across[None, :, None, :]
    share = area.astype(np.float32) / np.float32(PATCH * PATCH)
    return torch.from_numpy(share.reshape(layout.n_crops, GRID * GRID))
