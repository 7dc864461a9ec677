"""Reference preprocessing of Molmo 2: turns with images or a video to token ids and patches.

Slow and obvious on purpose. It shares no code with the processor that the engine uses, so that a
mistake in one is not repeated in the other.

Rules as published with AllenAI's molmo2 code. An image is cut into overlapping crops after a global
view of the whole; 2 x 2 patches make one feature. A frame of a video is one crop of 3 x 3 patches
per feature. Sizes come from the checkpoint's processor files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo_edge.checkpoint_files import processor_settings, read_json
from molmo_edge.errors import ModelError
from molmo_edge.reference.molmo_inputs import cut_patches, select_tiling

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Molmo2Inputs:
    """The images, or the frames, of one prompt."""

    # (crops, patches of a crop, values), normalised; patches in row-major order, each flattened as
    # (row, column, channel). Of each image the global view is first.
    patches: npt.NDArray[np.float32]
    # (features, patches of a feature), indices into all patches of all crops, -1 where a window
    # reaches beyond the grid. In the order of the `<im_patch>` tokens.
    pooling: Indices


def _neighbours(own: int, size: int) -> tuple[Indices, Indices, npt.NDArray[np.float32]]:
    """For each of `size` pixels: the two of `own` pixels it lies between, and the second's part."""
    scale = float(np.float32(own) / np.float32(size))
    place = np.maximum(scale * (np.arange(size) + 0.5) - 0.5, 0).astype(np.float32)
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, own - 1), place - first.astype(np.float32)


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """Bilinear without antialias, rounded to 8 bits, half to even.

    Exact ties are frequent, so the order of operations decides pixels. It is that of torch's
    `interpolate` on a CPU with AVX-512, whose products are added without rounding (fused).
    """
    top, bottom, down = _neighbours(image.shape[0], height)
    left, right, across = _neighbours(image.shape[1], width)
    down, across = down[:, None, None], across[:, None]
    up, back = np.float32(1) - down, np.float32(1) - across
    parts = [(up, back, top, left), (down, back, bottom, left), (down, across, bottom, right)]
    out = up * across * image[top][:, right]
    for vertical, horizontal, rows, columns in parts:
        product = (vertical * horizontal).astype(np.float64) * image[rows][:, columns]
        out = (product + out).astype(np.float32)
    return np.asarray(np.rint(out).astype(np.uint8))


def pool_windows(grid: Indices, pool: int) -> Indices:
    """(h, w) indices to (rows, columns, pool * pool); -1 where the grid ends inside a window."""
    (h, w), before = grid.shape, [(-side % pool) // 2 for side in grid.shape]
    rows, columns = math.ceil(h / pool), math.ceil(w / pool)
    out = np.full((rows, columns, pool * pool), -1, np.int64)
    for y in range(h):
        for x in range(w):
            to_y, to_x = y + before[0], x + before[1]
            part = to_y % pool * pool + to_x % pool
            out[to_y // pool, to_x // pool, part] = grid[y, x]
    return out


def chat_text(turns: Sequence[tuple[str, str]]) -> str:
    """The turns, (role, text) each, as the chat template of Molmo 2 writes them."""
    text = ""
    for role, said in turns:
        # The template has a blank before past answers, not before the next one.
        text += " " if role == "assistant" else ""
        text += f"<|im_start|>{role}\n{said}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


class Molmo2Processor:
    """Reads a checkpoint's tokenizer and processor files. Raises ModelError without them."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        image, video = (processor_settings(directory, kind) for kind in ("image", "video"))
        if not (image and video):
            raise ModelError(
                f"'{directory}' has no preprocessor_config.json for images and videos."
            )
        self._max_crops = int(image["max_crops"])
        self._patch = int(image["patch_size"])
        self._side = int(image["size"]["height"]) // self._patch  # patches along a crop
        self._first, self._last = image["overlap_margins"]  # patches that a neighbour keeps
        self._pool = int(image["pooling_size"][0])
        self._mean, self._std = (
            np.array(image[name], np.float32) for name in ("image_mean", "image_std")
        )
        self._frame_pool = int(video["pooling_size"][0])
        self._flags = {
            "image_use_col_tokens": True,
            "use_single_crop_col_tokens": None,
            "use_single_crop_start_token": True,
            "video_use_col_tokens": False,
            "use_frame_special_tokens": True,
            **processor_settings(directory),
        }
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        chats = PreTrainedTokenizerFast.from_pretrained(directory)
        self._template = chats.apply_chat_template if chats.chat_template else None
        names = read_json(directory / "tokenizer_config.json")
        self.bos = self._token_id(names.get("bos_token") or names["eos_token"])
        stop = read_json(directory / "generation_config.json")["eos_token_id"]
        stops = stop if isinstance(stop, list) else [stop]
        self.stop_ids = {self._token_id(names["eos_token"]), *stops}

    def _chat_text(self, turns: Sequence[tuple[str, str]]) -> str:
        if self._template is None:
            return chat_text(turns)
        messages = [
            {"role": role, "content": [{"type": "text", "text": said}]} for role, said in turns
        ]
        return str(self._template(messages, tokenize=False, add_generation_prompt=True))

    def _token_id(self, token: str | dict[str, Any]) -> int:
        name = token if isinstance(token, str) else token["content"]
        if (found := self.tokenizer.token_to_id(name)) is None:
            raise ModelError(f"The tokenizer lacks '{name}'. Download the checkpoint again.")
        return found

    def __call__(
        self,
        turns: Sequence[tuple[str, str]],
        images: Sequence[Pixels] = (),
        video: tuple[Sequence[Pixels], Sequence[float]] | None = None,
        max_crops: int | None = None,
    ) -> tuple[list[int], Molmo2Inputs | None]:
        """Return the prompt's token ids and its images.

        Turns are (role, text), from the user in turn with the assistant; images (height, width, 3)
        uint8 RGB of the whole conversation; a video is frames, as `images`, and their times in
        seconds. `max_crops`, by default the checkpoint's, do not count the global view.
        """
        crops: list[Pixels] = []
        pooling: list[Indices] = []
        text = ""
        for number, image in enumerate(images, 1):
            text += f"Image {number}" if len(images) > 1 else ""
            text += self._image(image, crops, pooling, max_crops or self._max_crops)
        for number, (frame, seconds) in enumerate(zip(*(video or ((), ())), strict=True)):
            text += f"{' ' if number else ''}{seconds:.1f} " + self._frame(frame, crops, pooling)
        text += self._chat_text(turns)
        ids = [self.bos, *self.tokenizer.encode(text, add_special_tokens=False).ids]
        if not crops:
            return ids, None
        scaled = (crop.astype(np.float32) / np.float32(255) for crop in crops)
        normal = ((crop - self._mean) / self._std for crop in scaled)
        patches = np.stack([cut_patches(crop, self._patch) for crop in normal])
        return ids, Molmo2Inputs(patches.astype(np.float32), np.concatenate(pooling))

    def _image(
        self, image: Pixels, crops: list[Pixels], pooling: list[Indices], max_crops: int
    ) -> str:
        """Add an image's crops and windows; returns its tokens."""
        side, first, last = self._side, self._first, self._last
        step = side - first - last
        size, stride, overlap = (n * self._patch for n in (side, step, first + last))
        height, width, _ = image.shape
        rows, columns = select_tiling(height, width, max_crops, stride, overlap)
        start = len(crops)
        crops.append(resize(image, size, size))
        tiled = resize(image, rows * stride + overlap, columns * stride + overlap)
        grid = np.zeros([n * step + first + last for n in (rows, columns)], np.int64)
        for row in range(rows):
            for column in range(columns):
                # Where crops overlap, each keeps what is nearer to its centre.
                top, left = (first if n else 0 for n in (row, column))
                bottom = side if row == rows - 1 else side - last
                right = side if column == columns - 1 else side - last
                kept = self._crop_indices(len(crops))[top:bottom, left:right]
                y, x = row * step, column * step
                grid[y + top : y + bottom, x + left : x + right] = kept
                y, x = row * stride, column * stride
                crops.append(tiled[y : y + size, x : x + size])
        whole = pool_windows(self._crop_indices(start), self._pool)
        tiles = pool_windows(grid, self._pool)
        for windows in (whole, tiles):
            pooling.append(windows.reshape(-1, windows.shape[-1]))
        flags = self._flags
        cols, whole_cols = flags["image_use_col_tokens"], flags["use_single_crop_col_tokens"]
        low = "<low_res_im_start>" if flags["use_single_crop_start_token"] else "<im_start>"
        base = _rows(whole, cols if whole_cols is None else whole_cols)
        return f"{low}{base}<im_end><im_start>{_rows(tiles, cols)}<im_end>"

    def _frame(self, frame: Pixels, crops: list[Pixels], pooling: list[Indices]) -> str:
        """Add a frame's crop and windows; returns its tokens."""
        size = self._side * self._patch
        windows = pool_windows(self._crop_indices(len(crops)), self._frame_pool)
        crops.append(resize(frame, size, size))
        pooling.append(windows.reshape(-1, windows.shape[-1]))
        kind = "frame" if self._flags["use_frame_special_tokens"] else "im"
        rows = _rows(windows, self._flags["video_use_col_tokens"])
        return f"<{kind}_start>{rows}<{kind}_end>"

    def _crop_indices(self, crop: int) -> Indices:
        count = self._side**2
        return np.arange(crop * count, (crop + 1) * count).reshape(self._side, self._side)


def _rows(windows: Indices, columns: bool) -> str:
    """Tokens of a grid of features; `columns`: each row ends in `<im_col>`."""
    row: str = "<im_patch>" * windows.shape[1] + ("<im_col>" if columns else "")
    return row * len(windows)
