"""The sizes of a model that decide memory and speed, summed over its tensors.

The tensors are those of the files' headers, or of the inventory for a ``config.json``.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molmo_edge.checkpoint_files import FLOATS, Tensor, read_config, tensors
from molmo_edge.devices.tensors import (
    KNOWN,
    TEXT,
    Shapes,
    gemma3_tensor_shapes,
    molmo2_tensor_shapes,
    tensor_shapes,
)
from molmo_edge.errors import ModelError, did_you_mean
from molmo_edge.files import file_mode
from molmo_edge.settings import PRECISIONS as REQUESTS

PRECISIONS = tuple(name for name in REQUESTS if name != "auto")
"""Of the blocks' dense weights; embeddings and tower stay BF16 in all of them."""

HEADS = ("none", "fp8", "w8a16", "w4a16")
"""Precisions of the LM head; "none" is BF16."""

QUANTISED_HEADS = (*HEADS[1:], "nvfp4")
"""That a checkpoint can have; `quantize` writes no NVFP4."""

_HEAD_NAMES = {"molmo": TEXT + "ff_out", "molmo2": "lm_head"}  # in checkpoints

# compressed-tensors' formats of dense weights.
_FORMATS = {"nvfp4-pack-quantized": "nvfp4", "float-quantized": "fp8", "naive-quantized": "fp8"}

# Bytes of one cached value, and of the float32 scale vLLM keeps beside each head's vector.
KV_DTYPES: Mapping[str, tuple[int, int]] = {
    "auto": (2, 0),
    "bfloat16": (2, 0),
    "fp8": (1, 0),
    "fp8_e4m3": (1, 0),
    "fp8_e5m2": (1, 0),
    "fp8_per_token_head": (1, 4),
    "int8_per_token_head": (1, 4),
}


# What reading a quantization_config of other types and values than expected raises.
_BROKEN = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, re.error,
)  # fmt: skip


def matrix_bytes(precision: str, rows: int, cols: int) -> int:
    """Bytes of one weight matrix with its scales, as vLLM keeps them.

    Scales are float32 per output row (fp8), BF16 per group of 128 columns (w8a16, w4a16), and FP8
    per group of 16 (nvfp4).
    """
    values = rows * cols
    return {
        "bf16": 2 * values,
        "fp8": values + 4 * rows,
        "w8a16": values + 2 * rows * math.ceil(cols / 128),
        "w4a16": values // 2 + 2 * rows * math.ceil(cols / 128),
        "nvfp4": values // 2 + rows * math.ceil(cols / 16),
    }[precision]


TOKENS_PER_FRAME = 90
"""Of a Molmo 2's video: 83 of the image, and at most 7 of its time."""

SHORTEST = 4096
"""Tokens; a shorter maximum is the user's decision."""

_CROPS = 9  # that the vision tower sees at a time: one image's 8 and the global view, or 8 frames


@dataclass(frozen=True)
class Activations:
    """Upper bounds, in bytes, of what a Molmo 2 needs for a moment beside weights and KV cache.

    Its image tokens see each other, so a prompt is computed in one step, however long it is.
    """

    prefill_per_token: int  # of a prompt, in the language model's widest layer
    encode_crops: int  # of the crops that the vision tower sees at a time
    encode_per_token: int  # pixels of a video that fills the prompt

    def encode(self, tokens: int) -> int:
        """In the vision tower, for the images or the video of a prompt."""
        return self.encode_crops + self.encode_per_token * tokens

    def prefill(self, tokens: int) -> int:
        """In the language model, for a prompt."""
        return self.prefill_per_token * tokens


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of one model."""

    name: str  # directory or hub name
    # The language model's attention; sliding layers see only the tokens of the window.
    layers: int
    kv_heads: int
    head_dim: int
    max_model_len: int  # positions the model was made for
    sliding_layers: int = 0
    sliding_window: int = 0
    qwen2: bool = False  # whether the decoder is Qwen2, whose keys have large outliers
    # Parameters; `head` is 0 when it is tied to the embedding.
    embedding: int
    head: int
    tower: int
    block_params: int  # of all of the decoder
    block_bytes: Mapping[str, int]  # of the decoder, by precision
    stored: str | None  # precision of a quantised checkpoint
    head_bytes: Mapping[str, int]  # of the LM head, by precision
    head_precision: str = "none"
    measured: bool  # whether read from headers rather than derived from config.json
    activations: Activations | None = None  # of a Molmo 2; vLLM bounds those of other models

    @property
    def parameters(self) -> int:
        return self.block_params + self.embedding + self.head + self.tower

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions this checkpoint, or one quantised from it, can have."""
        return PRECISIONS if self.stored is None else (self.stored,)

    def weight_bytes(self, precision: str) -> int:
        """Bytes of all weights in memory at a precision of ``precisions``.

        Raises ModelError for a quantised checkpoint of a kind that only its files can size.
        """
        return self._blocks(precision) + self._head + 2 * (self.embedding + self.tower)

    def decode_bytes(self, precision: str) -> int:
        """Bytes of weights read for every generated token: blocks and head.

        Of the embedding one row is read, and the tower only when an image comes in. See
        `weight_bytes` for errors.
        """
        return self._blocks(precision) + (self._head or 2 * self.embedding)

    def bytes_by_precision(self, *, float32: bool = False) -> dict[str, int]:
        """Bytes of all weights at each precision this very checkpoint can be loaded in.

        With ``float32`` what is not quantised takes four bytes per parameter, also under "bf16".
        """
        sizes = {}
        for name in ("bf16", "fp8") if self.stored is None else (self.stored,):
            sizes[name] = total = self.weight_bytes(name)
            if float32:
                sizes[name] += total if name == "bf16" else total - self._blocks(name)
                sizes[name] -= 0 if self.head_precision == "none" else self._head
        return sizes

    def kv_bytes(self, tokens: int, kv_cache_dtype: str) -> int:
        """Bytes of the KV cache of one request of that many tokens."""
        width, scale = KV_DTYPES[kv_cache_dtype]
        seen = (self.layers - self.sliding_layers) * tokens
        seen += self.sliding_layers * min(tokens, self.sliding_window)
        return 2 * self.kv_heads * (self.head_dim * width + scale) * seen

    def activation_bytes(self, tokens: int) -> int:
        """Bytes beside weights and KV cache for a prompt of that many tokens.

        0 for models whose prompts are computed in pieces of vLLM's choice.
        """
        size = self.activations
        return 0 if size is None else max(size.prefill(tokens), size.encode(tokens))

    def longest_request(
        self, limit: int, kv_cache_dtype: str, room: int | None, cache: int | None, scale: int = 1
    ) -> int:
        """Tokens of the longest request that fits: ``limit``, lowered in steps down to 4,096.

        ``room`` is bytes for KV cache and activations, where known, ``cache`` those of the KV
        cache, where fixed; ``scale`` is 2 where values take twice the bytes of BF16.
        """
        while limit > SHORTEST:
            kv = scale * self.kv_bytes(limit, kv_cache_dtype)
            needed = (cache or kv) + scale * self.activation_bytes(limit)
            if (cache is None or kv <= cache) and (room is None or needed <= room):
                break
            limit = max(SHORTEST, limit - 1024)
        return limit

    def with_head(self, precision: str) -> ModelShape:
        """The shape with the LM head at a precision of `HEADS`.

        Raises ModelError where the head is the embedding or the checkpoint is quantised already.
        """
        if precision not in HEADS:
            raise ModelError(f"unknown LM head {precision!r}: expected {', '.join(HEADS)}")
        if not self.head:
            raise ModelError(f"the LM head of {self.name} is its embedding and stays as it is")
        if self.stored is not None:
            raise ModelError(f"{self.name} is quantised, with its LM head as stored")
        return replace(self, head_precision=precision)

    @property
    def _head(self) -> int:
        if self.head_precision not in self.head_bytes:
            raise ModelError(
                f"the size of {self.name}'s LM head as {self.head_precision} is not known without "
                "its safetensors files"
            )
        return self.head_bytes[self.head_precision]

    def _blocks(self, precision: str) -> int:
        if precision not in self.block_bytes:
            raise ModelError(
                f"the size of {self.name} as {precision} is not known without its safetensors files"
            )
        return self.block_bytes[precision]


def frames_within(max_model_len: int) -> int:
    """Frames of a Molmo 2's video that leave room for a question and its answer."""
    return max(1, (max_model_len - min(1024, max_model_len // 4)) // TOKENS_PER_FRAME)


def model_shape(model: str | Path) -> ModelShape:
    """The shape of a checkpoint directory, or of a model known by its hub name.

    Raises ModelError if it is neither, has a broken file, or a layout not supported.
    """
    directory, name = Path(model), str(model)
    if stat.S_ISDIR(file_mode(directory)):
        return _shape(directory.name, read_config(directory), tensors(directory))
    if name in KNOWN:
        return _shape(name, KNOWN[name], [])
    raise ModelError(
        f"{name[:120]!r} is neither a model directory nor a model known by name."
        f"{did_you_mean(name, KNOWN)} Known are {', '.join(KNOWN)}."
    )


def inventory(config: Mapping[str, Any]) -> Shapes:
    """Name → shape of the tensors of an unquantised checkpoint with this `config.json`.

    Raises ModelError for a missing or wrong size, or an unknown model type.
    """
    known = {"molmo": tensor_shapes, "molmo2": molmo2_tensor_shapes, "gemma3": gemma3_tensor_shapes}
    if (family := config.get("model_type")) not in known:
        raise ModelError(
            f"config.json has model_type {family!r}; planning knows molmo, molmo2 and gemma3"
        )
    with _sizes_read():
        return known[family](config)


@contextmanager
def _sizes_read() -> Iterator[None]:
    try:
        yield
    except (AttributeError, LookupError, TypeError, ZeroDivisionError, ValueError) as exc:
        missing = f": {exc.args[0]}" if isinstance(exc, KeyError) else ""
        raise ModelError(f"config.json lacks a size or has a wrong one{missing}") from exc


def _shape(name: str, config: Mapping[str, Any], files: list[Tensor]) -> ModelShape:
    counts = _counts((part_of(name), size) for name, size in inventory(config).items())
    with _sizes_read():
        stored, head = stored_precision(config), stored_head(config)
        if config["model_type"] == "gemma3":
            attention = _gemma3(config["text_config"])
        else:
            attention = (_molmo2 if config["model_type"] == "molmo2" else _molmo)(config)
    if files and stored is None:
        counts = _counts((part_of(tensor.name), tensor.shape) for tensor in files)
    elif files:  # packed matrices hide their shapes, so only the bytes are the files'
        counts["block_bytes"] = {stored: _stored_bytes(files, "blocks")}
        counts["head_bytes"] = {head or "none": _stored_bytes(files, "head")}
    return ModelShape(
        name=name,
        **attention,
        **counts,
        stored=stored,
        head_precision=head or "none",
        measured=bool(files),
    )


def _molmo(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = int(config["num_attention_heads"])
    return {
        "layers": int(config["num_hidden_layers"]),
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config["hidden_size"]) // heads,
        "max_model_len": int(config.get("max_position_embeddings", 4096)),
        "qwen2": bool(config.get("qkv_bias")),
    }


def _molmo2(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = config["text_config"], config["vit_config"]
    hidden, mlp = int(text["hidden_size"]), int(text["intermediate_size"])
    width, used = int(vision["hidden_size"]), config["adapter_config"]["vit_layers"]
    depth = 1 + max(layer % int(vision["num_hidden_layers"]) for layer in used)
    patches, pixels = int(vision["image_num_pos"]), 3 * int(vision["image_patch_size"]) ** 2
    vision_mlp = int(vision["intermediate_size"])
    return {
        "layers": int(text["num_hidden_layers"]),
        "kv_heads": int(text["num_key_value_heads"]),
        "head_dim": int(text["head_dim"]),
        "max_model_len": int(text["max_position_embeddings"]),
        "activations": Activations(
            # Embeddings, features, residual, its norm and the layer's output; up, gate, product.
            prefill_per_token=2 * (5 * hidden + 3 * mlp),
            # The outputs of all blocks; up and its activation; q, k, v and output in float32.
            encode_crops=2 * _CROPS * patches * (width * (depth + 8) + 2 * vision_mlp),
            encode_per_token=4 * patches * pixels // TOKENS_PER_FRAME,
        ),
    }


def _gemma3(text: Mapping[str, Any]) -> dict[str, Any]:
    layers = int(text["num_hidden_layers"])
    kinds = text.get("layer_types")  # newer files list them, older ones give the period
    sliding = layers - layers // int(text.get("sliding_window_pattern", 6))
    return {
        "layers": layers,
        "kv_heads": int(text.get("num_key_value_heads", 4)),
        "head_dim": int(text.get("head_dim", 256)),
        "max_model_len": int(text.get("max_position_embeddings", 131072)),
        "sliding_layers": kinds.count("sliding_attention") if kinds else sliding,
        "sliding_window": int(text.get("sliding_window", 1024)),
    }


def _counts(parts: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Parameters of each part, and bytes of the blocks, of tensors given as part and shape."""
    params = dict.fromkeys(("embedding", "head", "tower", "blocks"), 0)
    block_bytes, head_bytes = dict.fromkeys(PRECISIONS, 0), dict.fromkeys(HEADS, 0)
    for part, shape in parts:
        size = math.prod(shape)
        params[part] += size
        if part == "blocks":
            for name in PRECISIONS:
                block_bytes[name] += matrix_bytes(name, *shape) if len(shape) == 2 else 2 * size
        elif part == "head":
            head_bytes = {name: matrix_bytes(name, *shape) for name in QUANTISED_HEADS}
            head_bytes["none"] = 2 * size
    return {
        "block_params": params.pop("blocks"),
        "block_bytes": block_bytes,
        "head_bytes": head_bytes,
        **params,
    }


def _stored_bytes(files: Iterable[Tensor], part: str) -> int:
    """Bytes of a part of a quantised checkpoint; what is not quantised becomes BF16."""
    return sum(
        2 * t.numel if t.dtype in FLOATS and t.name.endswith((".weight", ".bias")) else t.nbytes
        for t in files
        if part_of(t.name) == part
    )


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

    An unknown method or format is returned by its own name. Raises ModelError for a broken
    `quantization_config`.
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    quant = config.get("quantization_config", nested)
    if quant is None:
        return None
    try:
        method = str(quant.get("quant_method", "unknown")).lower()
        form = str(quant.get("format", method))
        if method == "compressed-tensors" and form in ("pack-quantized", "mixed-precision"):
            group, *_ = quant["config_groups"].values()
            return _group_precision(group, form)
    except _BROKEN as exc:
        raise ModelError(
            "config.json has a broken quantization_config. Download it again."
        ) from exc
    return _FORMATS.get(form, form)


def stored_head(config: Mapping[str, Any]) -> str | None:
    """Precision of the LM head in a Molmo checkpoint of compressed-tensors, None if not quantised.

    A layer is quantised as the group says that targets it by name or, like all linear layers, by
    class, unless it is ignored. Raises ModelError for a broken `quantization_config`.
    """
    quant, name = config.get("quantization_config"), _HEAD_NAMES.get(str(config.get("model_type")))
    if not quant or name is None:
        return None
    try:
        method = str(quant.get("quant_method")).lower()
        if method != "compressed-tensors" or _named(quant.get("ignore"), name):
            return None
        groups = list(quant.get("config_groups", {}).values())
        for target in (name, "Linear"):
            for group in groups:
                if _named(group.get("targets"), target):
                    return _group_precision(group, str(quant.get("format")))
    except _BROKEN as exc:
        raise ModelError(
            "config.json has a broken quantization_config. Download it again."
        ) from exc
    return None


def _named(targets: Iterable[str] | None, name: str) -> bool:
    """Whether a layer or class is among names and, after "re:", regular expressions."""
    return any(
        re.match(target[3:], name) is not None if target.startswith("re:") else target == name
        for target in targets or ()
    )


def _group_precision(group: Mapping[str, Any], form: str) -> str:
    form = str(group.get("format") or form)
    if form == "pack-quantized":
        return f"w{int(group['weights']['num_bits'])}a16"
    return _FORMATS.get(form, form)
