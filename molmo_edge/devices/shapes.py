"""The sizes of a model that decide memory and speed.

It counts bytes and FLOP; what fits a device and how fast it can be is ``plan``'s. Where the sizes
come from is ``model_configs``' (a configuration) and ``checkpoint``'s (files) to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from molmo_edge.errors import ModelError

PRECISIONS = ("bf16", "fp8", "w4a16", "nvfp4")
"""Of the language model's dense weights; embeddings, head and tower stay BF16 in all of them."""

# Bytes beside the packed values of one weight matrix: scales as vLLM keeps them.
#   fp8_per_channel: float32 for each output row; w4a16: BF16 for each group of 128;
#   nvfp4: FP8 for each group of 16; nf4 (bitsandbytes): float32 for each block of 64.
_MATRIX: Mapping[str, Callable[[int, int], int]] = {
    "bf16": lambda rows, cols: 2 * rows * cols,
    "fp8": lambda rows, cols: rows * cols + 4 * rows,
    "w4a16": lambda rows, cols: rows * cols // 2 + 2 * rows * math.ceil(cols / 128),
    "nvfp4": lambda rows, cols: rows * cols // 2 + rows * math.ceil(cols / 16),
    "nf4": lambda rows, cols: rows * cols // 2 + rows * cols // 16,
}

# Bytes of one cached value, and of the float32 scale vLLM keeps beside each head's vector.
KV_DTYPES: Mapping[str, tuple[int, int]] = {
    "bfloat16": (2, 0),
    "fp8": (1, 0),
    "fp8_per_token_head": (1, 4),
    "int8_per_token_head": (1, 4),
}


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
        name: folder or hub name.
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
        measured: whether the counts were read from headers rather than worked out.
    """

    name: str
    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_model_len: int
    linears: tuple[tuple[int, int, int], ...]
    block_other: int
    embedding: int
    head: int
    tower: int
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
        elif (size := _MATRIX.get(precision)) is None:
            raise ModelError(
                f"the size of {self.name} as {precision} is not known without its safetensors files"
            )
        else:
            blocks = sum(size(rows, cols) * count for rows, cols, count in self.linears)
            blocks += 2 * self.block_other
        return Weights(2 * self.embedding, blocks, 2 * self.head, 2 * self.tower)

    def decode_bytes(self, precision: str) -> int:
        """Bytes of weights read for every generated token: blocks and head.

        Of the embedding one row is read, and the tower only when a picture comes in.
        """
        weights = self.weights(precision)
        return weights.blocks + (weights.head or weights.embedding)

    def bytes_by_precision(self, *, float32: bool = False) -> dict[str, int]:
        """Bytes at each precision this very checkpoint can be loaded in.

        With ``float32`` all that is not quantised takes four bytes a parameter, also under "bf16".
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
        """Bytes of the KV cache of one request with so many tokens."""
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
