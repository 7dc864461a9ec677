"""The checkpoint, images and videos behind the reference outputs of `tests/data/molmo2`.

The outputs are those of AllenAI's Hugging Face code of Molmo 2 under transformers 4.57.6, sdpa, in
float32. Everything that went into them is a function of names and seeds.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from molmo_edge.models.molmo2.config import Layout
from molmo_edge.models.molmo2.synthetic import hub_config, write_checkpoint

Variant = Literal["qwen3", "olmo3"]
VARIANTS: dict[Variant, Layout] = {"qwen3": "4b", "olmo3": "o-7b"}


@cache
def golden(name: Literal["qwen3", "olmo3", "extra"]) -> dict[str, Any]:
    """The content of ``golden_NAME.json``; not to be changed."""
    path = Path(__file__).parent / "data" / "molmo2" / f"golden_{name}.json"
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def cases(variant: Variant) -> list[dict[str, Any]]:
    """One request each: prompt, token ids, features, greedy tokens and their logprobs."""
    found: list[dict[str, Any]] = golden(variant)["cases"]
    return found


def config(variant: Variant) -> dict[str, Any]:
    """Its `config.json`."""
    return hub_config(VARIANTS[variant], text={"vocab_size": 272})


def write(directory: Path, variant: Variant, dtype: torch.dtype = torch.float32) -> Path:
    """Write the checkpoint that gave the reference outputs; its tokens below 256 are bytes."""
    return write_checkpoint(directory, config(variant), weights=weight, dtype=dtype, words=())


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values of the tensor `name`: uniform, of a range that keeps every part of the model felt."""
    bits = _random(f"0|{name}", int(np.prod(shape))) >> np.uint64(11)
    values = (bits.astype(np.float64) / 2**53 * 2 - 1).reshape(shape)
    if name.endswith("q_norm.weight"):
        values = 2.5 + 0.5 * values
    elif name.endswith(("norm.weight", "ln_f.weight")):
        values = 1 + 0.2 * values
    elif name.endswith("bias"):
        values *= 0.1
    elif name.endswith("embedding"):
        values *= 0.5 if "positional" in name else 0.8
    else:
        strong = name.endswith(("lm_head.weight", "image_projector.w2.weight"))
        values = (4.0 if strong else 2.2) * values / np.sqrt(shape[1])
    return torch.from_numpy(values.astype(np.float32))


def image(seed: int, width: int, height: int) -> np.ndarray:
    """An RGB image, (height, width, 3) uint8: 8 × 8 cells of noise, and gradients."""
    cells = (_random(f"image|{seed}", 192) % np.uint64(200)).astype(np.int64).reshape(8, 8, 3)
    y, x = np.ogrid[:height, :width]
    gradient = (3 * y + 5 * x + 17 * seed) % 56
    return (cells[y * 8 // height, x * 8 // width] + gradient[..., None]).astype(np.uint8)


def video(seed: int, frames: int, width: int, height: int) -> np.ndarray:
    """An RGB video, (frames, height, width, 3) uint8: an image that moves to the right."""
    first = image(seed, width, height)
    return np.stack([np.roll(first, 11 * i, axis=1) for i in range(frames)])


def _random(key: str, count: int) -> np.ndarray:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(count)
