"""What quantising a checkpoint will do, decided from headers alone: which tensors, which files.

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
# By the names of the checkpoint and of vLLM: the tower and the LM head stay as they are.
IGNORED = ("re:.*vision_backbone.*", r"re:^model\.transformer\.ff_out$", "lm_head")
_FLOATS = ("F64", "F32", "F16", "BF16")
# A file of the output is held in memory while it is made.
SHARD_BYTES = 1 << 29


@dataclass(frozen=True)
class Tensor:
    """One tensor of the original and what it will take; `packed` when it gets fewer bits."""

    name: str
    file: str
    shape: tuple[int, ...]
    packed: bool
    in_bytes: int
    out_bytes: int


@dataclass(frozen=True)
class Job:
    """Tensors by output file, in order."""

    config: Mapping[str, Any]
    shards: tuple[tuple[Tensor, ...], ...]

    @property
    def in_bytes(self) -> int:
        return sum(t.in_bytes for shard in self.shards for t in shard)

    @property
    def out_bytes(self) -> int:
        return sum(t.out_bytes for shard in self.shards for t in shard)

    def file(self, index: int) -> str:
        """Name of an output file."""
        return f"model-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"


def plan(folder: Path, form: Format) -> Job:
    """Checks a checkpoint folder and plans its output.

    Raises:
        ModelError: no Molmo 1 checkpoint, or its download is not finished.
        QuantizeError: quantised already, lacking tensors, or of shapes the format cannot hold.
    """
    config = read_config(folder)
    if config.get("quantization_config") is not None:
        raise QuantizeError(
            f"'{folder}' is quantised already (its config.json has a quantization_config). Give "
            "the original checkpoint."
        )
    family = check_layout(config)
    check_weights(folder)
    found: dict[str, Tensor] = {}
    for stored in tensors(folder):
        name, shape = stored.name, stored.shape
        if stored.dtype not in _FLOATS:
            raise QuantizeError(
                f"'{name}' is stored as {stored.dtype}; the checkpoint is quantised already, or "
                "not an original. Weights are expected as float32, float16 or bfloat16."
            )
        packed = _QUANTIZED.fullmatch(name) is not None
        if packed:
            form.check(name, shape)
        out = form.stored_bytes(shape) if packed else stored.numel * 2
        found[name] = Tensor(name, stored.file.name, shape, packed, stored.nbytes, out)
    _check_names(config, family, found)
    return Job(config, _shards(list(found.values())))


def _check_names(config: Mapping[str, Any], family: Any, found: Mapping[str, Tensor]) -> None:
    from molmo_edge.devices.tensors import Tower, tensor_shapes

    blocks = re.compile(r".*\.resblocks\.(\d+)\.")
    tower = [int(m[1]) for name in found if (m := blocks.match(name))]
    expected = tensor_shapes(config, Tower(blocks=max(tower, default=0) + 1))
    if missing := sorted(expected.keys() - found.keys()):
        raise QuantizeError(
            f"The checkpoint lacks {len(missing)} tensors, first '{missing[0]}'. Finish the "
            "download, or give another one."
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise QuantizeError(
                f"'{name}' has shape {found[name].shape}, but config.json asks for {shape}."
            )


def _shards(tensors: list[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.out_bytes for t in shards[-1]) + tensor.out_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    return tuple(map(tuple, shards))
