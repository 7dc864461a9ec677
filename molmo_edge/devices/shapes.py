"""The sizes of a model that decide memory and speed, summed over its tensors.

The tensors are those of the files' headers, or of the inventory for a ``config.json``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molmo_edge.checkpoint_files import Tensor, read_config, tensors
from molmo_edge.devices.tensors import KNOWN, gemma3_parts, gemma3_shapes, tensor_shapes
from molmo_edge.errors import ModelError

# Bytes of one weight matrix with its scales, as vLLM keeps them: float32 per output row (fp8),
# BF16 per group of 128 (w4a16), FP8 per group of 16 (nvfp4), float32 per block of 64 (nf4 of
# bitsandbytes).
_MATRIX_BYTES: Mapping[str, Callable[[int, int], int]] = {
    "bf16": lambda rows, cols: 2 * rows * cols,
    "fp8": lambda rows, cols: rows * cols + 4 * rows,
    "w4a16": lambda rows, cols: rows * cols // 2 + 2 * rows * math.ceil(cols / 128),
    "nvfp4": lambda rows, cols: rows * cols // 2 + rows * math.ceil(cols / 16),
    "nf4": lambda rows, cols: rows * cols // 2 + rows * cols // 16,
}

PRECISIONS = tuple(name for name in _MATRIX_BYTES if name != "nf4")
"""Of the language model's dense weights; embeddings, head and tower stay BF16 in all of them."""

_FLOATS = ("F64", "F32", "F16", "BF16")
_FORMATS = {
    "nvfp4-pack-quantized": "nvfp4",
    "float-quantized": "fp8",
    "naive-quantized": "fp8",
}

# Bytes of one cached value, and of the float32 scale vLLM keeps beside each head's vector.
KV_DTYPES: Mapping[str, tuple[int, int]] = {
    "bfloat16": (2, 0),
    "fp8": (1, 0),
    "fp8_per_token_head": (1, 4),
    "int8_per_token_head": (1, 4),
}


def matrix_bytes(precision: str, rows: int, cols: int) -> int:
    """Bytes of one weight matrix at a precision of ``PRECISIONS``, scales included."""
    return _MATRIX_BYTES[precision](rows, cols)


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights by part, as they lie in the device's memory."""

    embedding: int
    blocks: int
    head: int
    tower: int

    @property
    def total(self) -> int:
        return self.embedding + self.blocks + self.head + self.tower


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model; counts are of parameters unless they say otherwise.

    Attributes:
        name: directory or hub name.
        family: ``model_type`` of its configuration.
        layers, heads, kv_heads, head_dim: of the language model's attention.
        sliding_layers, sliding_window: layers that see only that many tokens.
        max_model_len: positions the model was made for.
        linears: (rows, columns, how many) of the decoder blocks' weight matrices.
        block_other: parameters of blocks and final norm that are no matrix.
        embedding, head, tower: parameters; ``head`` is 0 when it is tied to the embedding.
        qwen2: whether the decoder is Qwen2, whose keys have large outliers.
        stored: precision of a quantised checkpoint, ``None`` when it is not quantised.
        stored_blocks: bytes of a quantised checkpoint's blocks.
        measured: whether the counts were read from headers rather than derived from config.json.
    """

    name: str
    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_model_len: int
    linears: tuple[tuple[int, int, int], ...] = ()
    block_other: int = 0
    embedding: int = 0
    head: int = 0
    tower: int = 0
    sliding_layers: int = 0
    sliding_window: int | None = None
    qwen2: bool = False
    stored: str | None = None
    stored_blocks: int | None = None
    measured: bool = False

    @property
    def matrix_params(self) -> int:
        return sum(rows * cols * count for rows, cols, count in self.linears)

    @property
    def parameters(self) -> int:
        return self.matrix_params + self.block_other + self.embedding + self.head + self.tower

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions this checkpoint, or one quantised from it, can have."""
        return PRECISIONS if self.stored is None else (self.stored,)

    def weights(self, precision: str) -> Weights:
        """Bytes by part at a precision of ``precisions``, or as bitsandbytes' "nf4".

        Raises:
            ModelError: a quantised checkpoint of a kind that only its files can size.
        """
        if precision == self.stored and self.stored_blocks is not None:
            blocks = self.stored_blocks
        elif (size := _MATRIX_BYTES.get(precision)) is None:
            raise ModelError(
                f"the size of {self.name} as {precision} is not known without its safetensors files"
            )
        else:
            blocks = sum(size(rows, cols) * count for rows, cols, count in self.linears)
            blocks += 2 * self.block_other
        return Weights(2 * self.embedding, blocks, 2 * self.head, 2 * self.tower)

    def decode_bytes(self, precision: str) -> int:
        """Bytes of weights read for every generated token: blocks and head.

        Of the embedding one row is read, and the tower only when an image comes in.
        """
        weights = self.weights(precision)
        return weights.blocks + (weights.head or weights.embedding)

    def bytes_by_precision(self, *, float32: bool = False) -> dict[str, int]:
        """Bytes at each precision this very checkpoint can be loaded in.

        With ``float32`` what is not quantised takes four bytes per parameter, also under "bf16".
        """
        names = ("bf16", "fp8") if self.stored is None else (self.stored,)
        sizes = {name: self.weights(name) for name in names}
        if not float32:
            return {name: size.total for name, size in sizes.items()}
        return {
            name: (2 * size.total if name == "bf16" else 2 * size.total - size.blocks)
            for name, size in sizes.items()
        }

    def kv_bytes(self, tokens: int, kv_cache_dtype: str) -> int:
        """Bytes of the KV cache of one request of that many tokens."""
        width, scale = KV_DTYPES[kv_cache_dtype]
        per_layer = 2 * self.kv_heads * (self.head_dim * width + scale)
        window = tokens if self.sliding_window is None else min(tokens, self.sliding_window)
        full = self.layers - self.sliding_layers
        return per_layer * (full * tokens + self.sliding_layers * window)

    def flops_per_token(self, context: int) -> float:
        """FLOP of one token that sees ``context`` others: matrices and attention, no head."""
        window = context if self.sliding_window is None else min(context, self.sliding_window)
        full = self.layers - self.sliding_layers
        seen = full * context + self.sliding_layers * window
        return 2.0 * self.matrix_params + 4.0 * self.heads * self.head_dim * seen


def model_shape(model: str | Path) -> ModelShape:
    """The shape of a checkpoint directory, or of a model known by its hub name.

    Raises:
        ModelError: neither a directory nor known, a broken file, or a layout not supported.
    """
    directory = Path(model)
    if directory.is_dir():
        return shape_from(directory.name, read_config(directory), tensors(directory))
    name = str(model)
    if name in KNOWN:
        return shape_from(name, KNOWN[name])
    near = difflib.get_close_matches(name[:120], KNOWN, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ModelError(
        f"{name[:120]!r} is neither a model directory nor a model known by name: {hint}"
        f"known are {', '.join(KNOWN)}"
    )


def shape_from(
    name: str, config: Mapping[str, Any], stored: Iterable[Tensor] = ()
) -> ModelShape:
    """The shape that a ``config.json`` and, if given, the stored tensors describe.

    Raises:
        ModelError: ``model_type`` is unknown, or a size is missing or wrong.
    """
    family = config.get("model_type")
    if family not in ("molmo", "gemma3", "gemma3_text"):
        known = "molmo or gemma3, with vision or without"
        raise ModelError(f"config.json has model_type {family!r}; planning knows {known}")
    try:
        shape = _molmo(name, config) if family == "molmo" else _gemma3(name, config)
        inventory = tensor_shapes(config) if family == "molmo" else gemma3_shapes(config)
    except (KeyError, TypeError, ZeroDivisionError, ValueError) as exc:
        missing = f": {exc.args[0]}" if isinstance(exc, KeyError) else ""
        raise ModelError(f"config.json lacks a size or has a wrong one{missing}") from exc
    shape = _count(shape, [Tensor(name, Path(), "BF16", size) for name, size in inventory.items()])
    shape = replace(shape, stored=stored_precision(config))
    return _count(replace(shape, measured=True), stored) if stored else shape


def _molmo(name: str, config: Mapping[str, Any]) -> ModelShape:
    heads = int(config["num_attention_heads"])
    return ModelShape(
        name=name,
        family="molmo",
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config["hidden_size"]) // heads,
        max_model_len=int(config.get("max_position_embeddings", 4096)),
        qwen2=bool(config.get("qkv_bias")),
    )


def _gemma3(name: str, config: Mapping[str, Any]) -> ModelShape:
    text, _ = gemma3_parts(config)
    layers = int(text["num_hidden_layers"])
    kinds = text.get("layer_types")  # newer files list them, older ones give the period
    sliding = layers - layers // int(text.get("sliding_window_pattern", 6))
    if isinstance(kinds, list):
        sliding = kinds.count("sliding_attention")
    return ModelShape(
        name=name,
        family=str(config["model_type"]),
        layers=layers,
        heads=int(text.get("num_attention_heads", 8)),
        kv_heads=int(text.get("num_key_value_heads", 4)),
        head_dim=int(text.get("head_dim", 256)),
        max_model_len=int(text.get("max_position_embeddings", 131072)),
        sliding_layers=sliding,
        sliding_window=int(text.get("sliding_window", 1024)),
    )


def _count(shape: ModelShape, found: Iterable[Tensor]) -> ModelShape:
    """The shape with its counts summed over the tensors."""
    linears: dict[tuple[int, int], int] = {}
    counts = dict.fromkeys(("embedding", "head", "tower", "other"), 0)
    block_bytes = 0
    for tensor in found:
        part = part_of(tensor.name)
        if part != "blocks":
            counts[part] += tensor.numel
            continue
        plain = tensor.dtype in _FLOATS and tensor.name.endswith((".weight", ".bias"))
        block_bytes += 2 * tensor.numel if plain else tensor.nbytes
        if plain and len(tensor.shape) == 2:
            rows, cols = tensor.shape
            linears[rows, cols] = linears.get((rows, cols), 0) + 1
        else:
            counts["other"] += tensor.numel
    shape = replace(
        shape, embedding=counts["embedding"], head=counts["head"], tower=counts["tower"]
    )
    if shape.stored is not None:
        # Packed matrices hide their shape: that of the inventory stays, the bytes are the files'.
        return replace(shape, stored_blocks=block_bytes)
    sizes = tuple((rows, cols, count) for (rows, cols), count in sorted(linears.items()))
    return replace(shape, linears=sizes, block_other=counts["other"])


def part_of(tensor: str) -> str:
    """Part of the model a tensor belongs to: tower, blocks, embedding or head."""
    if re.search(r"vision_backbone|vision_tower|vision_model|multi_modal_projector", tensor):
        return "tower"
    if re.search(r"(^|\.)(blocks|layers)\.\d+\.", tensor):
        return "blocks"
    if re.search(r"(^|\.)(wte|embed_tokens)\.", tensor):
        return "embedding"
    return "head" if re.search(r"(^|\.)(ff_out|lm_head)\.", tensor) else "blocks"


def stored_precision(config: Mapping[str, Any]) -> str | None:
    """Precision of a checkpoint's dense weights, ``None`` when it is not quantised.

    An unknown method is returned by its own name.
    """
    quant = config.get("quantization_config")
    text = config.get("text_config")
    if quant is None and isinstance(text, Mapping):
        quant = text.get("quantization_config")
    if not isinstance(quant, Mapping):
        return None
    method = str(quant.get("quant_method", "unknown")).lower()
    if method == "compressed-tensors":
        form = str(quant.get("format", ""))
        if form == "pack-quantized":
            return f"w{_bits(quant)}a16"
        return _FORMATS.get(form, form or method)
    if method == "modelopt":
        algorithm = str(quant.get("quant_algo", "")).lower()
        return algorithm if algorithm in ("nvfp4", "fp8") else method
    if method in ("gptq", "awq", "gptq_marlin", "awq_marlin", "auto-round", "intel/auto-round"):
        return f"w{_bits(quant)}a16"
    return method


def _bits(quant: Mapping[str, Any]) -> int:
    for key in ("bits", "w_bit"):
        if isinstance(quant.get(key), int):
            return int(quant[key])
    groups = quant.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and isinstance(weights.get("num_bits"), int):
            return int(weights["num_bits"])
    return 4
