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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from molmo_edge.checkpoint_files import Tensor
from molmo_edge.devices.tensors import BLOCKS, TEXT, VISION
from molmo_edge.errors import ImageError, QuantizeError
from molmo_edge.images import SUFFIXES, image_files, load
from molmo_edge.models.molmo.hf import load_tokenizer
from molmo_edge.models.molmo.prompts import ImageTokenIds, bos_id
from molmo_edge.quantize.formats import Format, pack, unpack
from molmo_edge.quantize.plan import Job
from molmo_edge.reference.molmo import ReferenceMolmo
from molmo_edge.reference.molmo_checkpoint import TextConfig, text_config
from molmo_edge.reference.molmo_inputs import ReferenceInputs, preprocess, sequence

LAYERS = ("att_proj", "attn_out", "ff_proj", "ff_out")
NORMS = {"attn_norm": "att_proj", "ff_norm": "ff_proj"}
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


class Inputs(NamedTuple):
    """Inputs x of a linear layer: some of its rows, and the mean x² and mean |x| by column."""

    rows: torch.Tensor
    mean_square: torch.Tensor
    mean_size: torch.Tensor


@dataclass(frozen=True)
class Calibration:
    """Statistics and scales by layer, float32 (columns,).

    Attributes:
        moments: mean square of the layer's inputs.
        scales: factors of its columns; absent where nothing can take the inverse.
    """

    config: TextConfig
    moments: Mapping[str, torch.Tensor]
    scales: Mapping[str, torch.Tensor]

    def apply(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor of the original with its scales applied; unchanged if it has none."""
        stem, _, kind = name.rpartition(".")
        block, _, layer = stem.rpartition(".")
        after = {"att_proj": "attn_out", "ff_proj": "ff_out"}.get(layer, "")
        columns = self.scales.get(f"{block}.{NORMS.get(layer, layer)}")
        rows = self.scales.get(f"{block}.{after}")
        if layer in NORMS:
            return value if columns is None else value.float() / columns
        if columns is not None and kind == "weight":
            value = value.float() * columns
        if rows is not None:
            divisor = torch.ones(len(value))
            if layer == "ff_proj":
                divisor[: len(rows)] = rows
            else:  # query heads that share a value have the same scale: take the first
                values = rows.view(self.config.kv_heads, -1, self.config.head)[:, 0].flatten()
                divisor[-len(values) :] = values
            value = value.float() / divisor.view(-1, *[1] * (value.ndim - 1))
        return value

    def importance(self, layer: str) -> torch.Tensor:
        """(columns,): mean square of the inputs that the scaled columns get."""
        scale = self.scales.get(layer)
        return self.moments[layer] if scale is None else self.moments[layer] / scale.square()


class Streamed(ReferenceMolmo):
    """The reference implementation with the weights of one part in memory at a time."""

    def __init__(self, config: TextConfig, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._seen: dict[str, list[Inputs]] = {}
        self._sample = SAMPLE
        super().__init__(config, self._read(TEXT + "wte.") | self._read(VISION))

    def states(self, prompts: Sequence[tuple[Any, ReferenceInputs]]) -> list[torch.Tensor]:
        """Inputs of the first block: (tokens, hidden) float32 for each prompt. Called once."""
        self._sample = max(1, SAMPLE // len(prompts))
        with torch.no_grad():
            states = [self._embed(ids, inputs) for ids, inputs in prompts]
        del self._embedding
        return states

    def run_block(
        self, number: int, states: list[torch.Tensor]
    ) -> tuple[dict[str, Inputs], dict[str, torch.Tensor]]:
        """Run a block over `states`, in place. Returns inputs by layer and the block's weights."""
        self._w = {}  # frees the last block before the next is read
        self._w = self._read(f"{BLOCKS}{number}.")
        self._seen = {layer: [] for layer in LAYERS}
        with torch.no_grad():
            for i, x in enumerate(states):
                states[i] = self._block(x, self._new_cache(), number)
        inputs = {}
        for layer, seen in self._seen.items():
            rows, squares, sizes = zip(*seen, strict=True)
            inputs[layer] = Inputs(
                torch.cat(rows), torch.stack(squares).mean(0), torch.stack(sizes).mean(0)
            )
        return inputs, self._w

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if (seen := self._seen.get(name.rpartition(".")[2])) is not None:
            taken = torch.linspace(0, len(x) - 1, min(self._sample, len(x))).long()
            seen.append(Inputs(x[taken], x.square().mean(0), x.abs().mean(0)))
        return super()._linear(x, name)

    def _read(self, start: str) -> dict[str, torch.Tensor]:
        weights = {}
        for tensor in self._tensors:
            if tensor.name.startswith(start):
                with safe_open(tensor.file, framework="pt") as opened:
                    weights[tensor.name] = opened.get_tensor(tensor.name).float()
                if not bool(weights[tensor.name].isfinite().all()):
                    raise QuantizeError(f"'{tensor.name}' contains NaN or infinity.")
        return weights


def choose_images(directory: Path) -> list[Path]:
    """The images that are used: all, or `MAX_IMAGES` spread evenly over the sorted names.

    Raises QuantizeError if there are none.
    """
    images = image_files(directory) if directory.is_dir() else []
    if not images:
        raise QuantizeError(
            f"'{directory}' is not a directory with images ({', '.join(SUFFIXES)}). Give one with "
            "typical images."
        )
    count = min(len(images), MAX_IMAGES)
    return [images[i * len(images) // count] for i in range(count)]


def read_images(checkpoint: Path, files: Sequence[Path]) -> list[tuple[Any, ReferenceInputs]]:
    """Token ids and preprocessed image of each file.

    Raises:
        QuantizeError: a file is not a readable image.
        ModelError: no tokenizer, or one that lacks the image tokens.
    """
    tokenizer = load_tokenizer(checkpoint)
    special = ImageTokenIds.from_vocab(tokenizer.get_vocab())
    text = tokenizer.encode(f" User: {QUESTION} Assistant:", add_special_tokens=False)
    prompts = []
    for file in files:
        try:
            inputs = preprocess(np.asarray(load(file)), special)
        except ImageError as exc:
            raise QuantizeError(
                f"'{file}' cannot be calibrated on: {exc}. Remove it from the directory."
            ) from exc
        prompts.append((sequence(inputs, text, bos_id(tokenizer)), inputs))
    return prompts


def calibrate(
    source: Path,
    job: Job,
    form: Format,
    files: Sequence[Path],
    progress: Callable[[int, int, str], None] = lambda done, count, name: None,
) -> Calibration:
    """Choose every layer's scales from its inputs on the images; `progress` counts blocks.

    Raises QuantizeError for an unreadable image, before any weights are read, and for weights
    that contain NaN or infinity.
    """
    prompts = read_images(source, files)
    config = text_config(job.config)
    model = Streamed(config, job.tensors)
    states = model.states(prompts)
    moments: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    for number in range(config.layers):
        block = f"{BLOCKS}{number}."
        inputs, weights = model.run_block(number, states)
        for layer, (rows, mean_square, size) in inputs.items():
            moments[block + layer] = mean_square
            if layer == "attn_out":
                by_head = size.view(config.kv_heads, -1, config.head)
                size = by_head.mean(1, keepdim=True).expand_as(by_head).flatten()
            if layer in ("attn_out", "ff_out") or not config.norm_after:
                weight = weights[f"{block}{layer}.weight"]
                scales[block + layer] = best_scale(weight, rows, mean_square, size, form)
        for norm, layer in NORMS.items():
            if (scale := scales.get(block + layer)) is not None:
                scales[block + layer] = through_bfloat16(weights[f"{block}{norm}.weight"], scale)
        progress(number + 1, config.layers, f"calibrated block {number + 1} of {config.layers}")
    return Calibration(config, moments, scales)


def best_scale(
    weight: torch.Tensor,
    rows: torch.Tensor,
    mean_square: torch.Tensor,
    size: torch.Tensor,
    form: Format,
) -> torch.Tensor:
    """(columns,) float32 with a geometric mean of 1: the best power of the inputs' `size`."""
    size = size.clamp_min(max(float(size.mean()) * _SMALLEST, 1e-30))
    taken = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long()
    weight, form = weight[taken], replace(form, search=_SEARCH)
    least, best = float("inf"), torch.ones_like(size)
    for exponent in EXPONENTS:
        scale = size.pow(exponent)
        scale = scale / scale.log().mean().exp()
        stored, _ = pack(weight * scale, form, mean_square / scale.square())
        difference = unpack(stored, form) / scale - weight
        error = float((rows @ difference.T).square().sum(dtype=torch.float64))
        if error < least:
            least, best = error, scale
    return best


def through_bfloat16(norm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest scale that makes ``norm / scale`` exact in bfloat16, as norms are stored."""
    stored = (norm / scale).bfloat16().float()
    usable = (stored != 0) & (norm != 0)
    return torch.where(usable, norm / torch.where(usable, stored, 1.0), 1.0)
