"""Pack one weight: scales are searched here, formats and packing are compressed-tensors'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from molmo_edge.devices.shapes import matrix_bytes
from molmo_edge.errors import QuantizeError

# Values packed at a time, in complete rows: they fit a processor's caches, and packing NVFP4 takes
# about a hundred bytes for each.
_VALUES = 1 << 19
# Multiples of compressed-tensors' own scale, largest value / 7.5 for 4-bit integers: smaller ones
# clip that value and round all others more finely. 15/14 and 15/16 put it on 7 and on -8.
_SEARCH = (1.0, 15 / 14, 15 / 16, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.66)


@dataclass(frozen=True)
class Format:
    """How one scheme stores a weight.

    Attributes:
        preset: its name in compressed-tensors.
        group: columns that share a scale; None for one scale per row.
        search: multiples of the covering scale that are tried for each group.
        scale_dtype: as stored.
        summary: for the model card.
    """

    scheme: str
    preset: str
    compression: str
    bits: int
    group: int | None
    search: tuple[float, ...]
    scale_dtype: torch.dtype
    summary: str

    @cached_property
    def quantization_scheme(self) -> Any:
        """compressed-tensors' `QuantizationScheme` for all linear layers."""
        return preset_name_to_scheme(self.preset, ["Linear"])

    @cached_property
    def compressor(self) -> Any:
        """compressed-tensors' compressor of this format."""
        return BaseCompressor.get_value_from_registry(self.compression)

    def stored_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes of a stored weight, scales included. Raises QuantizeError if it has none."""
        rows, columns = shape
        if self.group is not None and columns % self.group:
            raise QuantizeError(
                f"'{name}' has {columns} columns, not a multiple of the {self.group} that share a "
                f"scale in {self.scheme}. Use --scheme fp8."
            )
        return matrix_bytes(self.scheme, rows, columns) + 64  # the tensor's own scale or shape


FORMATS: Mapping[str, Format] = {
    form.scheme: form
    for form in (
        Format(
            "fp8", "FP8_DYNAMIC", "float-quantized", 8, None, (1.0,), torch.float32,
            "FP8 (E4M3) weights with a scale per row; activations are quantised to FP8 with a "
            "scale per token",
        ),
        Format(
            "w4a16", "W4A16", "pack-quantized", 4, 128, _SEARCH, torch.bfloat16,
            "symmetric 4-bit integers with a scale per 128 columns; activations are not quantised",
        ),
        Format(
            "nvfp4", "NVFP4A16", "nvfp4-pack-quantized", 4, 16, _SEARCH, torch.float8_e4m3fn,
            "NVFP4 weights: 4-bit floats (E2M1), an FP8 scale per 16 columns, a float32 scale per "
            "tensor; activations are not quantised",
        ),
    )
}  # fmt: skip


def format_of(scheme: str) -> Format:
    """Raises QuantizeError for an unknown scheme."""
    if scheme not in FORMATS:
        raise QuantizeError(f"Unknown scheme '{scheme}'; expected one of {', '.join(FORMATS)}.")
    return FORMATS[scheme]


# compressed-tensors compiles one small function of NVFP4's, which needs a C++ compiler.
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator, unused-ignore]
def pack(
    weight: torch.Tensor, form: Format, importance: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    """Pack a finite weight, (rows, columns) of any float dtype, rounding to the nearest value.

    The scale of each group is the one of `form.search` with the least squared error. `importance`,
    (columns,) and not negative, weights the columns; None weights all alike.

    Returns the stored tensors by compressed-tensors' suffix of the layer's name, and the relative
    error: Frobenius norm of (stored - original) over that of the original, columns weighted.
    """
    shared: dict[str, torch.Tensor] = {}
    if form.scheme == "nvfp4":
        low, high = torch.aminmax(weight.float())
        shared["weight_global_scale"] = generate_gparam(low, high)
    parts: list[dict[str, torch.Tensor]] = []
    wrong = whole = 0.0
    for part in weight.split(max(1, _VALUES // weight.shape[1])):
        rows = part.float()
        scale = _best_scale(rows, form, shared.get("weight_global_scale"), importance)
        packed = form.compressor.compress(
            {"weight": rows, "weight_scale": scale, **shared}, form.quantization_scheme
        )
        difference = unpack(packed, form) - rows
        wrong += float(_squares(difference, importance).sum(dtype=torch.float64))
        whole += float(_squares(rows, importance).sum(dtype=torch.float64))
        parts.append({**packed, "weight_scale": packed["weight_scale"].to(form.scale_dtype)})
    tensors = {
        suffix: torch.cat([stored[suffix] for stored in parts])
        for suffix in parts[0]
        if suffix not in ("weight_shape", *shared)
    }
    if "weight_shape" in parts[0]:
        tensors["weight_shape"] = torch.tensor(weight.shape)
    return tensors | shared, (wrong / whole) ** 0.5 if whole else 0.0


def unpack(tensors: Mapping[str, torch.Tensor], form: Format) -> torch.Tensor:
    """The values of a packed weight in float32, by compressed-tensors' own code."""
    given = {**tensors, "weight_scale": tensors["weight_scale"].float()}
    weight: torch.Tensor = form.compressor.decompress(given, form.quantization_scheme)["weight"]
    return weight.float()


def _squares(rows: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    return rows.square() if importance is None else rows.square() * importance


def _best_scale(
    rows: torch.Tensor,
    form: Format,
    global_scale: torch.Tensor | None,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """(rows, groups) float32, rounded to the stored dtype."""
    args = form.quantization_scheme.weights
    groups = rows.view(len(rows), -1, form.group or rows.shape[1])
    low, high = torch.aminmax(groups, dim=-1)
    best = torch.empty_like(low)
    least = torch.full_like(low, float("inf"))
    for factor in form.search:
        scale, _ = calculate_qparams(low * factor, high * factor, args, global_scale)
        scale = scale.to(form.scale_dtype).float()
        tried = fake_quantize(rows, scale, None, args, global_scale=global_scale)
        wrong = _squares(tried.float() - rows, importance).view_as(groups).sum(-1)
        better = wrong < least
        best[better], least[better] = scale[better], wrong[better]
    return best
