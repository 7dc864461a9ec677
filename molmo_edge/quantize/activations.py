"""The inputs of a checkpoint's linear layers on pictures, one block's weights in memory at a time.

The computation is the yardstick's (`molmo.reference`), in float32 on the CPU. The vision tower is
there while pictures are looked at, and gone before the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from molmo_edge.devices.tensors import BLOCKS, TEXT, VISION, VIT_BLOCKS
from molmo_edge.errors import ImageError, QuantizeError
from molmo_edge.quantize.fold import LAYERS
from molmo_edge.reference.molmo import ReferenceInputs, ReferenceMolmo, preprocess, sequence
from molmo_edge.reference.molmo_checkpoint import TextConfig, count_blocks

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# Statistics settle soon; a picture is up to 1,600 tokens.
MOST_PICTURES = 16
QUESTION = "Describe this image."
# Rows of each layer's inputs that are kept as they are, over all pictures.
SAMPLE = 256


@dataclass
class Inputs:
    """What came into one linear layer.

    Attributes:
        sample: (rows, columns) float32, taken evenly.
        squares, sizes: (columns,) float64, summed over `count` tokens: x² and |x|.
    """

    sample: list[torch.Tensor]
    squares: torch.Tensor
    sizes: torch.Tensor
    count: int

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat(self.sample)

    @property
    def mean_square(self) -> torch.Tensor:
        return (self.squares / self.count).float()

    @property
    def mean_size(self) -> torch.Tensor:
        return (self.sizes / self.count).float()


def picture_files(folder: Path) -> list[Path]:
    """The pictures that are used: all, or `MOST_PICTURES` spread evenly over the names.

    Raises QuantizeError: no folder, or no pictures in it.
    """
    if not folder.is_dir():
        raise QuantizeError(f"'{folder}' is no folder. Give one with pictures to calibrate on.")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        kinds = ", ".join(sorted(SUFFIXES))
        raise QuantizeError(f"'{folder}' holds no pictures ({kinds}). Put typical ones there.")
    count = min(len(found), MOST_PICTURES)
    return [found[i * len(found) // count] for i in range(count)]


def read_pictures(checkpoint: Path, files: Sequence[Path]) -> list[tuple[Any, ReferenceInputs]]:
    """Token ids and preprocessed picture of each file.

    Raises:
        QuantizeError: a file is no readable picture.
        ModelError: no tokenizer, or one that lacks the image tokens.
    """
    from molmo_edge.images import load, to_array
    from molmo_edge.models.molmo.hf import load_tokenizer
    from molmo_edge.models.molmo.prompts import ImageTokenIds, bos_id
    from molmo_edge.reference.molmo import SpecialTokens

    tokenizer = load_tokenizer(checkpoint)
    ids = ImageTokenIds.from_vocab(tokenizer.get_vocab())
    special = SpecialTokens(ids.start, ids.end, ids.patch, ids.col)
    text = tokenizer.encode(f" User: {QUESTION} Assistant:", add_special_tokens=False)
    bos = bos_id(tokenizer)
    prompts = []
    for file in files:
        try:
            seen = preprocess(to_array(load(file)), special)
        except ImageError as exc:
            raise QuantizeError(
                f"'{file}' cannot be calibrated on: {exc}. Take it out of the folder."
            ) from exc
        prompts.append((sequence(seen, text, bos), seen))
    return prompts


class Streamed(ReferenceMolmo):
    """The yardstick with the weights of one part in memory at a time."""

    # The yardstick's own way to be made holds all weights.
    def __init__(self, folder: Path, config: TextConfig, files: Mapping[str, str]) -> None:
        self.config = config
        self._folder, self._files = folder, files
        self._w: dict[str, torch.Tensor] = {}
        self._vit_blocks = count_blocks(dict.fromkeys(files, torch.empty(0)), VIT_BLOCKS)
        self._cached = None
        self._watch: Callable[[str, torch.Tensor], None] | None = None

    def states(self, prompts: Sequence[tuple[Any, ReferenceInputs]]) -> list[torch.Tensor]:
        """What enters the first block: (tokens, hidden) float32 for each prompt."""
        used = np.unique(np.concatenate([ids for ids, _ in prompts]))
        tables = (self._read(TEXT + "wte.embedding"), self._read(TEXT + "wte.new_embedding"))
        words = len(tables[0])
        if used[-1] >= words + len(tables[1]):
            raise QuantizeError("The tokenizer has ids that the checkpoint has no embedding for.")
        rows = [tables[0][i] if i < words else tables[1][i - words] for i in used.tolist()]
        self._embedding = torch.stack(rows).float()
        self._hold(VISION)
        with torch.no_grad():
            out = [self._embed(np.searchsorted(used, ids), seen) for ids, seen in prompts]
        self._w, self._cached = {}, None
        return out

    def blocks(
        self, states: list[torch.Tensor], sample: int = SAMPLE
    ) -> Iterator[tuple[str, dict[str, Inputs], Mapping[str, torch.Tensor]]]:
        """Runs block after block over `states`, which are replaced in place.

        Yields (start of its tensors' names, inputs by layer, its float32 weights by name).
        """
        each = math.ceil(sample / len(states))
        for number in range(self.config.layers):
            block = f"{BLOCKS}{number}."
            self._hold(block)
            found: dict[str, Inputs] = {}

            def watch(name: str, x: torch.Tensor, found: dict[str, Inputs] = found) -> None:
                taken = torch.linspace(0, len(x) - 1, min(each, len(x))).long()
                sums = x.double().square().sum(0), x.double().abs().sum(0)
                if (old := found.get(name)) is None:
                    found[name] = Inputs([x[taken]], *sums, len(x))
                else:
                    old.sample.append(x[taken])
                    old.squares += sums[0]
                    old.sizes += sums[1]
                    old.count += len(x)

            self._watch = watch
            with torch.no_grad():
                for i, x in enumerate(states):
                    states[i] = self._block(x, block, number)
            self._watch = None
            yield block, {name: found[block + name] for name in LAYERS}, self._w
        self._w = {}

    def _block(self, x: torch.Tensor, block: str, number: int) -> torch.Tensor:
        cache = self._new_cache()
        if self.config.norm_after:
            x = x + self._rms_norm(self._attend(x, block, cache, number), block + "attn_norm")
            return x + self._rms_norm(self._feed_forward(x, block), block + "ff_norm")
        x = x + self._attend(self._rms_norm(x, block + "attn_norm"), block, cache, number)
        return x + self._feed_forward(self._rms_norm(x, block + "ff_norm"), block)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self._watch is not None:
            self._watch(name, x)
        return super()._linear(x, name)

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._folder / self._files[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def _hold(self, start: str) -> None:
        self._w = {}
        self._w = {n: self._read(n).float() for n in self._files if n.startswith(start)}
