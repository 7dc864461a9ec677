"""Activation-aware scales: how much louder than the others each layer stores its loud channels.

The scale of a column is a power of the mean size of its input; the exponent of each layer is the
one of a small grid with the least error of the layer's output on rows of its real inputs. After
"AWQ: Activation-aware Weight Quantization" (Lin et al., arXiv 2306.00978), here for Molmo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from molmo_edge.errors import QuantizeError
from molmo_edge.quantize.activations import Inputs, Streamed, read_pictures
from molmo_edge.quantize.fold import NORMS, Calibration, Heads, through_bfloat16
from molmo_edge.quantize.formats import Format, pack, unpack
from molmo_edge.quantize.plan import Plan
from molmo_edge.reference.molmo_checkpoint import text_config

EXPONENTS = tuple(i / 8 for i in range(9))
# Exponents are compared on some rows of a weight, since all rows share its columns' scales, and
# with a short search of the groups' own.
_ROWS = 128
_SEARCH = (1.0, 0.86)
# The quietest channel is taken as loud as this share of the mean.
_QUIETEST = 1e-3


def heads_of(planned: Plan) -> Heads:
    config = text_config(planned.config)
    return Heads(config.heads, config.kv_heads, config.head)


def calibrate(
    source: Path,
    planned: Plan,
    form: Format,
    files: list[Path],
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Calibration:
    """Looks at the pictures and chooses every layer's scales; `progress` counts blocks.

    Raises QuantizeError for a picture that cannot be read, before any weights are, and for weights
    or what they lead to that are no finite numbers.
    """
    prompts = read_pictures(source, files)
    config, heads = text_config(planned.config), heads_of(planned)
    names = {tensor.name: tensor.file for shard in planned.shards for tensor in shard}
    model = Streamed(source, config, names)
    states = model.states(prompts)
    del prompts
    moments: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    for number, (block, inputs, weights) in enumerate(model.blocks(states), 1):
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise QuantizeError(f"'{name}' holds values that are no finite numbers.")
        for layer, seen in inputs.items():
            moments[block + layer] = seen.mean_square
            if not bool(torch.isfinite(seen.mean_square).all()):
                raise QuantizeError(
                    f"On these pictures '{block}{layer}' gets inputs that are no finite numbers."
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
    """(columns,) float32, its geometric mean 1; shared by query heads if `heads` are given."""
    sizes = inputs.mean_size
    if heads is not None:
        sizes = heads.shared(sizes)
    sizes = sizes.clamp_min(max(float(sizes.mean()) * _QUIETEST, 1e-30))
    taken = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long()
    rows, x, form = weight[taken], inputs.rows, replace(form, search=_SEARCH)
    least, best = float("inf"), torch.ones(weight.shape[1])
    for exponent in EXPONENTS:
        scale = sizes.pow(exponent)
        scale = scale / scale.log().mean().exp()
        if heads is not None:
            scale = heads.spread(scale)
        packed = pack(rows * scale, form, inputs.mean_square / scale.square())
        wrong = unpack(packed.tensors, form) / scale - rows
        error = float((x @ wrong.T).square().sum(dtype=torch.float64))
        if error < least:
            least, best = error, scale
    return best
