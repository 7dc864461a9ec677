"""Activation-aware scales: a layer's columns are stored scaled up where its inputs are large.

The inverse is applied where the inputs come from, so that the model computes the same:

    att_proj, ff_proj   the norm before them (not where norms come after, as in Molmo-7B-O)
    attn_out            the value rows of att_proj; query heads that share them share the scale
    ff_out              the rows of ff_proj that are not the gate's

A column's scale is a power of the mean size of its input; each layer's exponent is the one of a
small grid with the least error of the layer's output. After "AWQ: Activation-aware Weight
Quantization" (Lin et al., arXiv 2306.00978). Inputs come from the reference implementation, in
float32 on the CPU, with the weights of one block in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from molmo_edge.devices.tensors import BLOCKS, TEXT, VISION, VIT_BLOCKS
from molmo_edge.errors import ImageError, QuantizeError
from molmo_edge.quantize.formats import Format, pack, unpack
from molmo_edge.quantize.plan import Job
from molmo_edge.reference.molmo import ReferenceInputs, ReferenceMolmo, preprocess, sequence
from molmo_edge.reference.molmo_checkpoint import TextConfig, count_blocks, text_config

LAYERS = ("att_proj", "attn_out", "ff_proj", "ff_out")
NORMS = {"attn_norm.weight": "att_proj", "ff_norm.weight": "ff_proj"}
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# Statistics converge on few images, each of which has up to 1,600 tokens.
MAX_IMAGES = 16
QUESTION = "Describe this image."
# Rows of each layer's inputs that are kept, over all images.
SAMPLE = 256
EXPONENTS = tuple(i / 8 for i in range(9))
# Exponents are compared on a few rows of a weight, since all rows share its columns' scales, and
# with a short search of the groups' scales.
_ROWS = 128
_SEARCH = (1.0, 0.86)
# The smallest mean input of a channel that is considered, relative to the mean over channels.
_SMALLEST = 1e-3


@dataclass(frozen=True)
class Heads:
    """Layout of the attention's channels: (kv_heads, heads / kv_heads, size), flattened."""

    heads: int
    kv_heads: int
    size: int

    def shared(self, channels: torch.Tensor) -> torch.Tensor:
        """(heads * size,) to (kv_heads * size,): the mean over query heads that share one."""
        return channels.view(self.kv_heads, -1, self.size).mean(1).flatten()

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """(kv_heads * size,) to (heads * size,)."""
        each = values.view(self.kv_heads, 1, self.size)
        return each.expand(-1, self.heads // self.kv_heads, -1).flatten()


@dataclass(frozen=True)
class Calibration:
    """Statistics and scales by layer, float32 (columns,).

    Attributes:
        moments: mean square of the layer's inputs.
        scales: factors of its columns; absent where nothing can take the inverse.
    """

    heads: Heads
    moments: Mapping[str, torch.Tensor]
    scales: Mapping[str, torch.Tensor]

    def apply(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor of the original with its scales applied; unchanged if it has none."""
        block, _, tail = name.rpartition(".blocks.")
        number, _, part = tail.partition(".")
        if not block:
            return value
        start = f"{block}.blocks.{number}."
        if part in NORMS and (scale := self.scales.get(start + NORMS[part])) is not None:
            return value.float() / scale
        layer, _, kind = part.rpartition(".")
        if layer not in LAYERS:
            return value
        changed = value
        if kind == "weight" and (scale := self.scales.get(start + layer)) is not None:
            changed = changed.float() * scale
        if layer == "att_proj" and (scale := self.scales.get(start + "attn_out")) is not None:
            # Query heads that share a value have the same scale: take the first.
            values = scale.view(self.heads.kv_heads, -1, self.heads.size)[:, 0].flatten()
            changed = _divide(changed, values, len(changed) - len(values))
        if layer == "ff_proj" and (scale := self.scales.get(start + "ff_out")) is not None:
            changed = _divide(changed, scale, 0)
        return changed

    def importance(self, layer: str) -> torch.Tensor:
        """(columns,): mean square of the inputs that the scaled columns get."""
        moments = self.moments[layer]
        scale = self.scales.get(layer)
        return moments if scale is None else moments / scale.square()


def _divide(value: torch.Tensor, scale: torch.Tensor, first: int) -> torch.Tensor:
    """Divide the rows from `first` on, of a weight or a bias, by `scale`."""
    changed = value.float().clone()
    rows = changed[first : first + len(scale)]
    rows /= scale.view(-1, *[1] * (value.ndim - 1))
    return changed


def through_bfloat16(norm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest scale that makes ``norm / scale`` exact in bfloat16, as norms are stored."""
    stored = (norm.float() / scale).bfloat16().float()
    usable = (stored != 0) & (norm != 0)
    return torch.where(usable, norm.float() / torch.where(usable, stored, 1.0), 1.0)


@dataclass
class Inputs:
    """Statistics of one linear layer's inputs.

    Attributes:
        sample: (rows, columns) float32, spaced evenly over the tokens.
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


def image_files(directory: Path) -> list[Path]:
    """The images that are used: all, or `MAX_IMAGES` spread evenly over the sorted names.

    Raises QuantizeError if it is not a directory or contains no images.
    """
    if not directory.is_dir():
        raise QuantizeError(f"'{directory}' is not a directory. Give one with typical images.")
    images = sorted(p for p in directory.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not images:
        kinds = ", ".join(sorted(SUFFIXES))
        raise QuantizeError(f"'{directory}' contains no images ({kinds}). Add some typical ones.")
    count = min(len(images), MAX_IMAGES)
    return [images[i * len(images) // count] for i in range(count)]


def read_images(checkpoint: Path, files: Sequence[Path]) -> list[tuple[Any, ReferenceInputs]]:
    """Token ids and preprocessed image of each file.

    Raises:
        QuantizeError: a file is not a readable image.
        ModelError: no tokenizer, or one that lacks the image tokens.
    """
    from molmo_edge.images import load
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
            inputs = preprocess(np.asarray(load(file)), special)
        except ImageError as exc:
            raise QuantizeError(
                f"'{file}' cannot be calibrated on: {exc}. Remove it from the directory."
            ) from exc
        prompts.append((sequence(inputs, text, bos), inputs))
    return prompts


class Streamed(ReferenceMolmo):
    """The reference implementation with the weights of one part in memory at a time."""

    # `ReferenceMolmo.__init__` takes all weights at once.
    def __init__(self, directory: Path, config: TextConfig, files: Mapping[str, str]) -> None:
        self.config = config
        self._directory, self._files = directory, files
        self._w: dict[str, torch.Tensor] = {}
        self._vit_blocks = count_blocks(dict.fromkeys(files, torch.empty(0)), VIT_BLOCKS)
        self._cached = None
        self._watch: Callable[[str, torch.Tensor], None] | None = None

    def states(self, prompts: Sequence[tuple[Any, ReferenceInputs]]) -> list[torch.Tensor]:
        """Inputs of the first block: (tokens, hidden) float32 for each prompt."""
        used = np.unique(np.concatenate([ids for ids, _ in prompts]))
        tables = (self._read(TEXT + "wte.embedding"), self._read(TEXT + "wte.new_embedding"))
        words = len(tables[0])
        if used[-1] >= words + len(tables[1]):
            raise QuantizeError("The tokenizer has ids that the checkpoint has no embedding for.")
        rows = [tables[0][i] if i < words else tables[1][i - words] for i in used.tolist()]
        self._embedding = torch.stack(rows).float()
        self._hold(VISION)
        with torch.no_grad():
            out = [self._embed(np.searchsorted(used, ids), inputs) for ids, inputs in prompts]
        self._w, self._cached = {}, None
        return out

    def blocks(
        self, states: list[torch.Tensor], sample: int = SAMPLE
    ) -> Iterator[tuple[str, dict[str, Inputs], Mapping[str, torch.Tensor]]]:
        """Run block after block over `states`, which are updated in place.

        Yields (prefix of its tensors' names, inputs by layer, its float32 weights by name).
        """
        each = math.ceil(sample / len(states))
        for number in range(self.config.layers):
            block = f"{BLOCKS}{number}."
            self._hold(block)
            layers: dict[str, Inputs] = {}

            def watch(name: str, x: torch.Tensor, layers: dict[str, Inputs] = layers) -> None:
                taken = torch.linspace(0, len(x) - 1, min(each, len(x))).long()
                sums = x.double().square().sum(0), x.double().abs().sum(0)
                if (old := layers.get(name)) is None:
                    layers[name] = Inputs([x[taken]], *sums, len(x))
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
            yield block, {name: layers[block + name] for name in LAYERS}, self._w
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
        with safe_open(self._directory / self._files[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def _hold(self, start: str) -> None:
        self._w = {}
        self._w = {n: self._read(n).float() for n in self._files if n.startswith(start)}


def heads_of(job: Job) -> Heads:
    config = text_config(job.config)
    return Heads(config.heads, config.kv_heads, config.head)


def calibrate(
    source: Path,
    job: Job,
    form: Format,
    files: list[Path],
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Calibration:
    """Choose every layer's scales from its inputs on the images; `progress` counts blocks.

    Raises QuantizeError for an unreadable image, before any weights are read, and for weights or
    inputs of a layer that contain NaN or infinity.
    """
    prompts = read_images(source, files)
    config, heads = text_config(job.config), heads_of(job)
    names = {tensor.name: tensor.file for tensor in job.tensors}
    model = Streamed(source, config, names)
    states = model.states(prompts)
    del prompts
    moments: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    for number, (block, inputs, weights) in enumerate(model.blocks(states), 1):
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise QuantizeError(f"'{name}' contains NaN or infinity.")
        for layer, statistics in inputs.items():
            moments[block + layer] = statistics.mean_square
            if not bool(torch.isfinite(statistics.mean_square).all()):
                raise QuantizeError(
                    f"On these images '{block}{layer}' has inputs that contain NaN or infinity."
                )
        norms = {} if config.norm_after else NORMS
        for norm, layer in norms.items():
            weight = weights[f"{block}{layer}.weight"]
            scale = best_scale(weight, inputs[layer], form)
            scales[block + layer] = through_bfloat16(weights[block + norm], scale)
        for layer, tied in (("attn_out", heads), ("ff_out", None)):
            weight = weights[f"{block}{layer}.weight"]
            scales[block + layer] = best_scale(weight, inputs[layer], form, tied)
        progress(number, config.layers)
    return Calibration(heads, moments, scales)


def best_scale(
    weight: torch.Tensor, inputs: Inputs, form: Format, heads: Heads | None = None
) -> torch.Tensor:
    """(columns,) float32, its geometric mean is 1; shared by query heads if `heads` is given."""
    sizes = inputs.mean_size
    if heads is not None:
        sizes = heads.shared(sizes)
    sizes = sizes.clamp_min(max(float(sizes.mean()) * _SMALLEST, 1e-30))
    taken = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long()
    rows, x, form = weight[taken], inputs.rows, replace(form, search=_SEARCH)
    least, best = float("inf"), torch.ones(weight.shape[1])
    for exponent in EXPONENTS:
        scale = sizes.pow(exponent)
        scale = scale / scale.log().mean().exp()
        if heads is not None:
            scale = heads.spread(scale)
        packed = pack(rows * scale, form, inputs.mean_square / scale.square())
        delta = unpack(packed.tensors, form) / scale - rows
        error = float((x @ delta.T).square().sum(dtype=torch.float64))
        if error < least:
            least, best = error, scale
    return best
