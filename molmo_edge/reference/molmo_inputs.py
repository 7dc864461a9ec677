"""Reference preprocessing: one image to crops, masks, positions and image tokens.

Slow, obvious NumPy on purpose. It shares no code with the processor that the engine uses, so that
a mistake in one is not repeated in the other.

Geometry and constants as published with AllenAI's Molmo-7B-D-0924, -7B-O-0924 and -72B-0924. A
crop is 336 x 336 pixels: 24 x 24 patches, which the model pools 2 x 2 to 12 x 12 features. Crops
of the tiling overlap, one starts every 224 pixels; of the overlap each neighbour keeps one half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from molmo_edge.errors import ImageError
from molmo_edge.models.molmo.prompts import ImageTokenIds
from molmo_edge.models.prompts import bos_id

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]

CROP_PX = 336
PATCH_PX = 14
STRIDE_PX = 224  # from one crop of the tiling to the next
OVERLAP_PX = CROP_PX - STRIDE_PX  # shared with the next crop
POOLED = CROP_PX // PATCH_PX // 2  # pooled features along one side of a crop
POOLED_STRIDE = STRIDE_PX // PATCH_PX // 2
POOLED_DROP = OVERLAP_PX // PATCH_PX // 4  # half of the overlap, in pooled features
DROPPED = -100  # `image_input_idx` of a feature that belongs to the neighbour

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's, RGB
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclass(frozen=True, eq=False)
class ReferenceInputs:
    """One image as the model takes it."""

    image_tokens: Array  # (n,) int64, both views, without BOS and text
    # (1 + crops, 576, 588) float32, normalised patches, each flattened as (row, column, channel);
    # the global view first, then the crops in row-major order.
    images: FloatArray
    # (1 + crops, 576) float32, fraction of each patch that is image. Rows are those of the crops,
    # then one of -1: the published code pads at the end although the global view is first, and the
    # weights were trained with that.
    image_masks: FloatArray
    # (1 + crops, 144) int32, where each pooled feature goes in a sequence that has BOS in front;
    # -100 where it is dropped.
    image_input_idx: Array


def select_tiling(
    height: int, width: int, max_crops: int, stride: int = STRIDE_PX, overlap: int = OVERLAP_PX
) -> tuple[int, int]:
    """Rows and columns of crops for an image of that size in pixels; Molmo 2's with its sizes."""
    sides = range(1, max_crops + 1)
    tilings = [
        (rows, columns) for rows in sides for columns in sides if rows * columns <= max_crops
    ]
    tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))  # ties: first wins
    with np.errstate(divide="ignore"):  # a side as small as the overlap never limits: infinite
        scales = np.array(
            [
                min(
                    np.float32(rows * stride) / np.float32(height - overlap),
                    np.float32(columns * stride) / np.float32(width - overlap),
                )
                for rows, columns in tilings
            ],
            np.float32,
        )
    if np.all(scales < 1):
        return tilings[int(np.argmax(scales))]  # shrink as little as possible
    return tilings[int(np.argmin(np.where(scales < 1, np.float32(1e10), scales)))]


def _resize_rows(image: FloatArray, size: int) -> FloatArray:
    """Triangle filter along axis 0; made wider when shrinking, so that nothing is skipped."""
    scale = len(image) / size
    reach = max(scale, 1.0)
    out = np.empty((size, *image.shape[1:]), np.float32)
    for row in range(size):
        centre = (row + 0.5) * scale
        first = max(int(np.floor(centre - reach)), 0)
        last = min(int(np.ceil(centre + reach)), len(image))
        weights = 1.0 - np.abs(np.arange(first, last) + 0.5 - centre) / reach
        weights = np.maximum(weights, 0.0)
        weights /= weights.sum()
        out[row] = np.tensordot(weights.astype(np.float32), image[first:last], axes=1)
    return out


def resize(image: FloatArray, height: int, width: int) -> FloatArray:
    """(h, w, 3) float32 in [0, 1] to (height, width, 3): bilinear with antialias, clipped."""
    tall = _resize_rows(image, height)
    turned = np.ascontiguousarray(tall.swapaxes(0, 1))
    return np.clip(_resize_rows(turned, width).swapaxes(0, 1), 0.0, 1.0)


def _fit(image: FloatArray, height: int, width: int) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """The whole image, centred on a canvas: normalised pixels, and where the image is."""
    own_height, own_width = np.float32(image.shape[0]), np.float32(image.shape[1])
    # In float32, like the original: the rounding now and then decides a size.
    scale = min(np.float32(height) / own_height, np.float32(width) / own_width)
    new_height = max(int(own_height * scale), 1)
    new_width = max(int(own_width * scale), 1)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    inside = slice(top, top + new_height), slice(left, left + new_width)
    canvas = np.zeros((height, width, 3), np.float32)
    canvas[inside] = resize(image, new_height, new_width)
    shown = np.zeros((height, width), np.bool_)
    shown[inside] = True
    return (canvas - MEAN) / STD, shown


def cut_patches(crop: Array, patch: int = PATCH_PX) -> Array:
    """(336, 336, ...) to (576, values): patches in row-major order, each one flattened."""
    starts = range(0, len(crop), patch)
    return np.stack(
        [crop[y : y + patch, x : x + patch].reshape(-1) for y in starts for x in starts]
    )


def _view_tokens(ids: ImageTokenIds, rows: int, columns: int) -> list[int]:
    return [ids.start, *([ids.patch] * columns + [ids.col]) * rows, ids.end]


def _kept(index: int, count: int) -> slice:
    """Which pooled rows (or columns) crop `index` of `count` in a line keeps."""
    first = 0 if index == 0 else POOLED_DROP
    last = POOLED if index == count - 1 else POOLED - POOLED_DROP
    return slice(first, last)


def preprocess(image: Array, token_ids: ImageTokenIds, max_crops: int = 12) -> ReferenceInputs:
    """Convert one image, (height, width, 3) uint8 RGB, to what the model takes.

    Raises ImageError for any other array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ImageError("The reference takes (height, width, 3) uint8 RGB, at least one pixel.")
    pixels = image.astype(np.float32) / np.float32(255)
    rows, columns = select_tiling(image.shape[0], image.shape[1], max_crops)

    whole, _ = _fit(pixels, CROP_PX, CROP_PX)
    tiled, shown = _fit(pixels, rows * STRIDE_PX + OVERLAP_PX, columns * STRIDE_PX + OVERLAP_PX)

    grid_rows = rows * POOLED_STRIDE + POOLED - POOLED_STRIDE
    grid_columns = columns * POOLED_STRIDE + POOLED - POOLED_STRIDE
    tokens = np.array(
        _view_tokens(token_ids, POOLED, POOLED) + _view_tokens(token_ids, grid_rows, grid_columns),
        np.int64,
    )
    places = np.flatnonzero(tokens == token_ids.patch) + 1  # + 1: BOS
    grid = places[POOLED * POOLED :].reshape(grid_rows, grid_columns)

    images, masks = [cut_patches(whole)], []
    positions = [places[: POOLED * POOLED]]
    for row in range(rows):
        for column in range(columns):
            y, x = row * STRIDE_PX, column * STRIDE_PX
            images.append(cut_patches(tiled[y : y + CROP_PX, x : x + CROP_PX]))
            inside = shown[y : y + CROP_PX, x : x + CROP_PX].astype(np.float32)
            masks.append(cut_patches(inside).mean(axis=-1))
            y, x = row * POOLED_STRIDE, column * POOLED_STRIDE
            window = grid[y : y + POOLED, x : x + POOLED]
            keep = _kept(row, rows), _kept(column, columns)
            position = np.full((POOLED, POOLED), DROPPED)
            position[keep] = window[keep]
            positions.append(position.reshape(-1))
    masks.append(np.full(len(masks[0]), -1, np.float32))
    return ReferenceInputs(
        image_tokens=tokens,
        images=np.stack(images).astype(np.float32),
        image_masks=np.stack(masks).astype(np.float32),
        image_input_idx=np.stack(positions).astype(np.int32),
    )


class MolmoProcessor:
    """Reads a checkpoint's tokenizer. Raises ModelError without one."""

    def __init__(self, directory: Path) -> None:
        from molmo_edge.models.molmo.hf import load_tokenizer

        self._tokenizer = load_tokenizer(directory)
        self._ids = ImageTokenIds.from_vocab(self._tokenizer.get_vocab())
        self.stop_ids = {int(self._tokenizer.eos_token_id)}

    def __call__(
        self, question: str, images: Sequence[Array] = (), max_crops: int = 12
    ) -> tuple[list[int], ReferenceInputs | None]:
        """Return the prompt's token ids and its image, if there is one, as the model takes it."""
        inputs = preprocess(images[0], self._ids, max_crops) if images else None
        # Written out, because the engine's own prompt code is compared with it.
        text = self._tokenizer.encode(f" User: {question} Assistant:", add_special_tokens=False)
        return sequence(inputs, text, bos_id(self._tokenizer)).tolist(), inputs


def sequence(
    inputs: ReferenceInputs | None, text_ids: Sequence[int], bos_id: int
) -> npt.NDArray[np.int64]:
    """BOS, the image's tokens if there is one, the text's: (n,) int64."""
    image_ids = [] if inputs is None else inputs.image_tokens.tolist()
    return np.array([bos_id, *image_ids, *text_ids], np.int64)
