"""Pack one weight: scales are searched here, formats and packing are compressed-tensors'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

# Values packed at a time, in complete rows: they fit a processor's caches, and packing NVFP4 takes
# about a hundred bytes for each.
_VALUES = 1 << 19
# Multiples of the scale that covers a group, largest value / 7.5 for 4-bit integers: smaller ones
# clip that value and round all others more finely. 15/14 and 15/16 put it on 7 and on -8.
_SEARCH = (1.0, 15 / 14, 15 / 16, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.66)


@dataclass(frozen=True)
class Format:
    """How a scheme stores the weights of linear layers."""

    preset: str  # name of the scheme in compressed-tensors
    compression: str  # and of its packing
    bits: int
    group: int | None  # columns that share a scale; None for one scale per row
    scale_dtype: torch.dtype  # as stored
    summary: str  # for the model card

    @property
    def quantization_scheme(self) -> Any:
        """compressed-tensors' `QuantizationScheme` of all linear layers."""
        return self.scheme_of("Linear")

    def scheme_of(self, *targets: str) -> Any:
        """The same for layers by class, name, or "re:" and a regular expression."""
        scheme = preset_name_to_scheme(self.preset, list(targets))
        scheme.format = self.compression
        return scheme

    @property
    def compressor(self) -> Any:
        """compressed-tensors' class that packs and unpacks."""
        return BaseCompressor.get_value_from_registry(self.compression)


FORMATS: Mapping[str, Format] = {
    "fp8": Format(
        "FP8_DYNAMIC", "float-quantized", 8, None, torch.float32,
        "FP8 (E4M3) weights with a scale per row; activations are quantised to FP8 with a "
        "scale per token",
    ),
    "w4a16": Format(
        "W4A16", "pack-quantized", 4, 128, torch.bfloat16,
        "symmetric 4-bit integers with a scale per 128 columns; activations are not quantised",
    ),
    "nvfp4": Format(
        "NVFP4A16", "nvfp4-pack-quantized", 4, 16, torch.float8_e4m3fn,
        "NVFP4 weights: 4-bit floats (E2M1), an FP8 scale per 16 columns, a float32 scale per "
        "tensor; activations are not quantised",
    ),
}  # fmt: skip

HEADS: Mapping[str, Format | None] = {
    "none": None,
    "fp8": FORMATS["fp8"],
    "w8a16": Format(
        "W8A16", "pack-quantized", 8, 128, torch.bfloat16,
        "symmetric 8-bit integers with a scale per 128 columns; activations are not quantised",
    ),
    "w4a16": FORMATS["w4a16"],
}  # fmt: skip
"""How the LM head can be stored; None is bfloat16."""

DEFAULT_HEADS: Mapping[str, str] = {"fp8": "none", "w4a16": "fp8", "nvfp4": "fp8"}
"""By scheme: the smallest head whose drift is lost in that of the blocks."""


# compressed-tensors compiles one small function of NVFP4's, which needs a C++ compiler.
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator, unused-ignore]
def pack(
    weight: torch.Tensor, form: Format, importance: torch.Tensor | float = 1.0
) -> tuple[dict[str, torch.Tensor], float]:
    """Pack a finite weight, (rows, columns) of any float dtype, rounding to the nearest value.

    `importance`, (columns,) and not negative, weights squared errors by column. The scale of each
    group is the one that is searched for the least sum of them.

    Returns the stored tensors by compressed-tensors' suffix of the layer's name, and the relative
    error: Frobenius norm of (stored - original) over that of the original, columns weighted.
    """
    shared: dict[str, torch.Tensor] = {}
    if form.scale_dtype == torch.float8_e4m3fn:
        low, high = torch.aminmax(weight.float())
        shared["weight_global_scale"] = generate_gparam(low, high)
    parts: list[dict[str, torch.Tensor]] = []
    error = norm = 0.0
    for part in weight.split(max(1, _VALUES // weight.shape[1])):
        rows = part.float()
        scale = _best_scale(rows, form, shared.get("weight_global_scale"), importance)
        packed = form.compressor.compress(
            {"weight": rows, "weight_scale": scale, **shared}, form.quantization_scheme
        )
        difference = unpack(packed, form) - rows
        error += float((difference.square() * importance).sum(dtype=torch.float64))
        norm += float((rows.square() * importance).sum(dtype=torch.float64))
        parts.append({**packed, "weight_scale": packed["weight_scale"].to(form.scale_dtype)})
    tensors = {
        suffix: torch.cat([stored[suffix] for stored in parts])
        for suffix in parts[0]
        if suffix not in ("weight_shape", *shared)
    }
    if "weight_shape" in parts[0]:
        tensors["weight_shape"] = torch.tensor(weight.shape)
    return tensors | shared, (error / norm) ** 0.5 if norm else 0.0


def unpack(tensors: Mapping[str, torch.Tensor], form: Format) -> torch.Tensor:
    """The values of a packed weight in float32, by compressed-tensors' own code."""
    given = {**tensors, "weight_scale": tensors["weight_scale"].float()}
    weight: torch.Tensor = form.compressor.decompress(given, form.quantization_scheme)["weight"]
    return weight.float()


def _best_scale(
    rows: torch.Tensor,
    form: Format,
    global_scale: torch.Tensor | None,
    importance: torch.Tensor | float,
) -> torch.Tensor:
    """(rows, groups) float32, rounded to the stored dtype."""
    args = form.quantization_scheme.weights
    groups = rows.view(len(rows), -1, form.group or rows.shape[1])
    low, high = torch.aminmax(groups, dim=-1)
    best = torch.empty_like(low)
    least = torch.full_like(low, float("inf"))
    for factor in _SEARCH if form.bits == 4 else (1.0,):
        scale, _ = calculate_qparams(low * factor, high * factor, args, global_scale)
        scale = scale.to(form.scale_dtype).float()
        stored = fake_quantize(rows, scale, None, args, global_scale=global_scale).float()
        error = ((stored - rows).square() * importance).view_as(groups).sum(-1)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best
