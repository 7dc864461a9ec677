"""Plan the output of `quantize` from a checkpoint's headers: which tensors go to which file.

Reads no weights and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.checkpoint_files import check_weights, read_config, tensors
from molmo_edge.errors import QuantizeError
from molmo_edge.models.molmo.config import check_layout
from molmo_edge.quantize.formats import Format

# Linear layers of the language model. Every MLP ends in `.ff_out` and so does the LM head.
_QUANTIZED = re.compile(
    r"model\.transformer\.blocks\.\d+\.(att_proj|attn_out|ff_proj|ff_out)\.weight"
)
# The vision tower and the LM head, by the checkpoint's names and by vLLM's.
IGNORED = ("re:.*vision_backbone.*", r"re:^model\.transformer\.ff_out$", "lm_head")
_FLOATS = ("F64", "F32", "F16", "BF16")
# An output file is held in memory until it is written.
SHARD_BYTES = 1 << 29


@dataclass(frozen=True)
class Tensor:
    """A tensor of the original and its size in the output; `packed` if it is quantised."""

    name: str
    file: str
    shape: tuple[int, ...]
    packed: bool
    in_bytes: int
    out_bytes: int


@dataclass(frozen=True)
class Job:
    """The original's config and its tensors by output file, in order."""

    config: Mapping[str, Any]
    shards: tuple[tuple[Tensor, ...], ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for shard in self.shards for tensor in shard)

    @property
    def in_bytes(self) -> int:
        return sum(t.in_bytes for t in self.tensors)

    @property
    def out_bytes(self) -> int:
        return sum(t.out_bytes for t in self.tensors)

    def file(self, index: int) -> str:
        """Name of an output file."""
        return f"model-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"


def plan(directory: Path, form: Format) -> Job:
    """Check a checkpoint directory and plan its output.

    Raises:
        ModelError: not a Molmo 1 checkpoint, or an unfinished download.
        QuantizeError: quantised already, missing tensors, or shapes that the format cannot store.
    """
    config = read_config(directory)
    if config.get("quantization_config") is not None:
        raise QuantizeError(
            f"'{directory}' is quantised already (its config.json has a quantization_config). Give "
            "the original checkpoint."
        )
    family = check_layout(config)
    check_weights(directory)
    stored: dict[str, Tensor] = {}
    for tensor in tensors(directory):
        name, shape = tensor.name, tensor.shape
        if tensor.dtype not in _FLOATS:
            raise QuantizeError(
                f"'{name}' is stored as {tensor.dtype}; the checkpoint is quantised already, or "
                "not an original. Weights are expected as float32, float16 or bfloat16."
            )
        packed = _QUANTIZED.fullmatch(name) is not None
        if packed:
            form.check(name, shape)
        out = form.stored_bytes(shape) if packed else tensor.numel * 2
        stored[name] = Tensor(name, tensor.file.name, shape, packed, tensor.nbytes, out)
    _check_names(config, family, stored)
    return Job(config, _shards(list(stored.values())))


def _check_names(config: Mapping[str, Any], family: Any, stored: Mapping[str, Tensor]) -> None:
    from molmo_edge.devices.tensors import Tower, tensor_shapes

    blocks = re.compile(r".*\.resblocks\.(\d+)\.")
    tower = [int(m[1]) for name in stored if (m := blocks.match(name))]
    expected = tensor_shapes(config, Tower(blocks=max(tower, default=0) + 1))
    if missing := sorted(expected.keys() - stored.keys()):
        raise QuantizeError(
            f"The checkpoint lacks {len(missing)} tensors, first '{missing[0]}'. Finish the "
            "download, or give another one."
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise QuantizeError(
                f"'{name}' has shape {stored[name].shape}, but config.json asks for {shape}."
            )


def _shards(tensors: list[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.out_bytes for t in shards[-1]) + tensor.out_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    return tuple(map(tuple, shards))
