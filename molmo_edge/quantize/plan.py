"""Check a checkpoint by its headers before it is quantised. Reads no weights, writes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.checkpoint_files import Tensor, check_weights, read_config, tensors
from molmo_edge.devices.tensors import VIT_BLOCKS, Tower, tensor_shapes
from molmo_edge.errors import QuantizeError
from molmo_edge.models.molmo.config import check_layout
from molmo_edge.quantize.formats import Format
from molmo_edge.reference.molmo_checkpoint import count_blocks

# Linear layers of the language model. Every MLP ends in `.ff_out` and so does the LM head.
_QUANTIZED = re.compile(
    r"model\.transformer\.blocks\.\d+\.(att_proj|attn_out|ff_proj|ff_out)\.weight"
)
# The vision tower and the LM head, by the checkpoint's names and by vLLM's.
IGNORED = ("re:.*vision_backbone.*", r"re:^model\.transformer\.ff_out$", "lm_head")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Job:
    """The original's config.json and tensors, and the bytes of the output's weights."""

    config: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    out_bytes: int

    @property
    def in_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def is_quantized(name: str) -> bool:
    """Whether the tensor is one that `quantize` stores in fewer bits."""
    return _QUANTIZED.fullmatch(name) is not None


def plan(directory: Path, form: Format) -> Job:
    """Check a checkpoint directory.

    Raises:
        ModelError: not a Molmo 1 checkpoint, or an unfinished download.
        QuantizeError: quantised already, missing tensors, or shapes that the format cannot store.
    """
    config = read_config(directory)
    check_layout(config)
    check_weights(directory)
    stored = {tensor.name: tensor for tensor in tensors(directory)}
    if config.get("quantization_config") is not None:
        raise QuantizeError(
            f"'{directory}' is quantised already (its config.json has a quantization_config). Give "
            "the original checkpoint."
        )
    expected = tensor_shapes(config, Tower(blocks=count_blocks(stored, VIT_BLOCKS)))
    if missing := sorted(expected.keys() - stored.keys()):
        raise QuantizeError(
            f"The checkpoint lacks {len(missing)} tensors, first '{missing[0]}'. Finish the "
            "download, or give another one."
        )
    out_bytes = 0
    for name, tensor in stored.items():
        if tensor.dtype not in _FLOATS:
            raise QuantizeError(
                f"'{name}' is stored as {tensor.dtype}; the checkpoint is quantised already, or "
                "not an original. Weights are expected as float32, float16 or bfloat16."
            )
        if tensor.shape != expected.get(name, tensor.shape):
            raise QuantizeError(
                f"'{name}' has shape {tensor.shape}, but config.json asks for {expected[name]}."
            )
        if is_quantized(name):
            out_bytes += form.stored_bytes(name, tensor.shape)
        else:
            out_bytes += tensor.numel * 2
    return Job(config, tuple(stored.values()), out_bytes)
