"""Activation-aware scales: a layer's columns are stored scaled up where its inputs are large.

The inverse is applied where the inputs come from, so that the model computes the same:

    att_proj, ff_proj   the norm before them (not where norms come after, as in Molmo-7B-O)
    attn_out            the value rows of att_proj; query heads that share them share the scale
    ff_out              the rows of ff_proj that are not the gate's
    LM head             the norm before it

A column's scale is a power of the root mean square of its input; each layer's exponent is the one
of a small grid with the least error. After "AWQ: Activation-aware Weight Quantization" (Lin et al.,
arXiv 2306.00978). Inputs come from the reference implementation, in float32 on the CPU.
"""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from molmo_edge.checkpoint_files import Tensor, read_config
from molmo_edge.devices.tensors import BLOCKS, TEXT, VISION
from molmo_edge.errors import ImageError, QuantizeError
from molmo_edge.files import file_mode
from molmo_edge.images import SUFFIXES, image_files, load
from molmo_edge.quantize.formats import Format, pack
from molmo_edge.reference.checkpoint import text_config
from molmo_edge.reference.common import ReferenceModel
from molmo_edge.reference.molmo import ReferenceMolmo
from molmo_edge.reference.molmo2 import ReferenceMolmo2
from molmo_edge.reference.molmo2_inputs import Molmo2Processor
from molmo_edge.reference.molmo_inputs import MolmoProcessor

LAYERS = ("att_proj", "attn_out", "ff_proj", "ff_out")
# Statistics converge on few images, each of which has up to 1,600 tokens.
MAX_IMAGES = 16
QUESTION = "Describe this image."
EXPONENTS = tuple(i / 8 for i in range(9))
# Exponents are compared on a few rows of a weight, since all rows share its columns' scales.
_ROWS = 128
# The smallest input of a column that is considered, relative to the mean over columns.
_SMALLEST = 1e-3

Prompt = tuple[Any, Any]
"""Token ids, and the reference implementation's inputs for the image."""


@dataclass(frozen=True)
class Calibration:
    """What the images tell about a checkpoint, float32; empty without images."""

    # Tensor → what it is multiplied with before it is stored, broadcast to its shape.
    factors: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    # Layer → (columns,) mean square of its inputs, which become smaller as columns are scaled up.
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)


class _Streamed(ReferenceModel[Any]):
    """The reference implementation with the weights of one block in memory at a time.

    Names are those of Molmo 1. `moments` has, by layer, the mean squares of its inputs, (columns,),
    summed over the prompts.
    """

    def __init__(self, config: Any, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.moments: dict[str, torch.Tensor] = {}
        super().__init__(config, self._read(TEXT + "wte.") | self._read(VISION))

    def embed(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """Inputs of the first block, (tokens, hidden) for each prompt. Called once."""
        states = [self._embed(ids, inputs) for ids, inputs in prompts]
        self._masks = [self._two_way(ids) for ids, _ in prompts]
        del self._embedding
        return states

    def run_block(self, number: int, states: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run a block over `states`, in place; returns its weights."""
        self._w = {}  # frees the last block before the next is read
        self._w = self._read(f"{BLOCKS}{number}.")
        for i, x in enumerate(states):
            states[i] = self._block(x, self._new_cache(), number, self._masks[i])
        return self._w

    def run_head(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Run the final norm and the head over the last block's outputs; returns its weight."""
        self._w = self._read(TEXT + "ln_f.") | self._read(self.LM_HEAD + ".")
        for x in states:
            self._linear(self._rms_norm(x, TEXT + "ln_f"), self.LM_HEAD)
        return self._w[self.LM_HEAD + ".weight"]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name.startswith((BLOCKS, self.LM_HEAD)):
            self.moments[name] = self.moments.get(name, 0) + x.square().mean(0)
        return super()._linear(x, name)

    def _read(self, prefix: str) -> dict[str, torch.Tensor]:
        weights = {}
        for tensor in self._tensors:
            if tensor.name.startswith(prefix):
                with safe_open(tensor.file, framework="pt") as file:
                    weights[_short(tensor.name)] = file.get_tensor(tensor.name).float()
        return weights


class _StreamedMolmo(_Streamed, ReferenceMolmo): ...


class _StreamedMolmo2(_Streamed, ReferenceMolmo2): ...


def _short(name: str) -> str:
    """A tensor's name as Molmo 1 has it."""
    return name.replace(".self_attn.", ".").replace(".mlp.", ".")


def read_prompts(checkpoint: Path, directory: Path) -> list[Prompt]:
    """Token ids and inputs of a directory's images: all, or `MAX_IMAGES` spread over the names.

    Raises QuantizeError without images or for an unreadable one, ModelError without a tokenizer
    that has the image tokens.
    """
    files = image_files(directory) if stat.S_ISDIR(file_mode(directory)) else []
    if not files:
        raise QuantizeError(
            f"'{directory}' is not a directory with images ({', '.join(SUFFIXES)}). Give one with "
            "typical images."
        )
    count = min(len(files), MAX_IMAGES)
    molmo2 = read_config(checkpoint).get("model_type") == "molmo2"
    processor: Any = (Molmo2Processor if molmo2 else MolmoProcessor)(checkpoint)
    question = [("user", QUESTION)] if molmo2 else QUESTION
    prompts = []
    for file in (files[i * len(files) // count] for i in range(count)):
        try:
            prompts.append(processor(question, [np.asarray(load(file))]))
        except ImageError as exc:
            raise QuantizeError(
                f"'{file}' cannot be calibrated on: {exc}. Remove it from the directory."
            ) from exc
    return prompts


def calibrate(
    config: Mapping[str, Any],
    tensors: Sequence[Tensor],
    form: Format,
    head: Format | None,
    prompts: Sequence[Prompt],
    progress: Callable[[int, int, str], object],
) -> Calibration:
    """Choose scales of the blocks' layers, and of a head with groups; `progress` counts blocks."""
    model: _Streamed
    if config.get("model_type") == "molmo2":
        model = _StreamedMolmo2(config, tensors)
    else:
        model = _StreamedMolmo(text_config(config), tensors)
    text = model.config
    states = model.embed(prompts)
    factors: dict[str, list[torch.Tensor]] = defaultdict(list)
    importance: dict[str, torch.Tensor] = {}
    for number in range(text.layers):
        block = f"{BLOCKS}{number}."
        weights = model.run_block(number, states)
        for layer in LAYERS:
            weight, square = weights[f"{block}{layer}.weight"], model.moments[block + layer]
            importance[block + layer] = square
            if text.norm_after and layer in ("att_proj", "ff_proj"):
                continue
            size = square
            if layer == "attn_out":
                by_head = square.view(text.kv_heads, -1, text.head)
                size = by_head.mean(1, keepdim=True).expand_as(by_head).flatten()
            scale = best_scale(weight, square, size.sqrt(), form)
            importance[block + layer] = square / scale.square()
            factors[f"{block}{layer}.weight"].append(scale)
            if layer == "attn_out":
                values = scale.view(text.kv_heads, -1, text.head)[:, 0].flatten()
                rows = len(weights[block + "att_proj.weight"])
                inverse = torch.cat([torch.ones(rows - len(values)), 1 / values])
                factors[block + "att_proj.weight"].append(inverse[:, None])
                factors[block + "att_proj.bias"].append(inverse)
            elif layer == "ff_out":
                inverse = torch.cat([1 / scale, torch.ones_like(scale)])
                factors[block + "ff_proj.weight"].append(inverse[:, None])
            else:
                norm = {"att_proj": "attn_norm", "ff_proj": "ff_norm"}[layer]
                factors[f"{block}{norm}.weight"].append(1 / scale)
        progress(number + 1, text.layers, f"calibrated block {number + 1} of {text.layers}")
    if head is not None and head.group:
        weight = model.run_head(states)
        square = model.moments[model.LM_HEAD]
        scale = best_scale(weight, square, square.sqrt(), head)
        importance[model.LM_HEAD] = square / scale.square()
        factors[model.LM_HEAD + ".weight"].append(scale)
        factors[TEXT + "ln_f.weight"].append(1 / scale)
    names = {_short(tensor.name): tensor.name for tensor in tensors}
    return Calibration(
        {names.get(name, name): parts for name, parts in factors.items()},
        {
            names[f"{layer}.weight"].removesuffix(".weight"): square
            for layer, square in importance.items()
        },
    )


def best_scale(
    weight: torch.Tensor, importance: torch.Tensor, size: torch.Tensor, form: Format
) -> torch.Tensor:
    """(columns,) with a geometric mean of 1: the best power of the inputs' `size`."""
    size = size.clamp_min(max(float(size.mean()) * _SMALLEST, 1e-30))
    rows = weight[torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long()]
    scales = [(size / size.log().mean().exp()).pow(exponent) for exponent in EXPONENTS]
    return min(scales, key=lambda scale: pack(rows * scale, form, importance / scale.square())[1])
