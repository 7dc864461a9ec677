"""Check that a checkpoint directory holds all that an engine needs, before one is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from molmo_edge.checkpoint_files import (
    FLOATS,
    Tensor,
    check_data_files,
    check_tensors,
    check_weights,
    tensors,
)
from molmo_edge.devices.shapes import (
    QUANTISED_HEADS,
    inventory,
    part_of,
    stored_head,
    stored_precision,
)
from molmo_edge.devices.tensors import gemma3_name
from molmo_edge.errors import ModelError


def check_files(config: Mapping[str, Any], directory: Path, load_format: str) -> None:
    """Raise ModelError unless data files and tensors are there, as `config` describes them.

    Of weights in a format of vLLM's own (``"sharded_state"``) the names are not checked.
    """
    if load_format != "dummy":
        check_weights(directory)
    check_data_files(directory)
    if load_format == "dummy" or "sharded" in load_format:
        return
    stored, head = tensors(directory), stored_head(config)
    for tensor in stored:
        refused = ("embedding",) if head in QUANTISED_HEADS else ("embedding", "head")
        if tensor.dtype not in FLOATS and part_of(tensor.name) in refused:
            raise ModelError(
                f"'{tensor.name}' is quantised in a way that is not supported: the LM head can be "
                f"{', '.join(QUANTISED_HEADS)} of compressed-tensors, the embedding nothing. "
                "Quantise the original again with it among the ignored layers, or with "
                "`molmo-edge quantize`."
            )
    if head in QUANTISED_HEADS:
        _check_head([t for t in stored if part_of(t.name) == "head"], config, head)
    if config["model_type"] == "gemma3":
        # Some files repeat the embedding as the head that it is.
        named = [replace(tensor, name=gemma3_name(tensor.name)) for tensor in stored]
        stored = [tensor for tensor in named if tensor.name != "lm_head.weight"]
    check_tensors(stored, inventory(config), quantised=stored_precision(config) is not None)


def _check_head(parts: list[Tensor], config: Mapping[str, Any], head: str) -> None:
    """Raise ModelError unless each part of a quantised head has the vocabulary's rows."""
    if all(part.dtype in FLOATS for part in parts):
        raise ModelError(
            "config.json says that the LM head is quantised, and it is not. Add its name to the "
            "ignored layers of the quantization_config."
        )
    shapes = inventory(config)
    [(rows, _)] = [shape for name, shape in shapes.items() if part_of(name) == "head"]
    dtypes = {"fp8": "F8_E4M3", "nvfp4": "U8"}
    for part in parts:
        kind = part.name.rpartition(".")[2]
        right = True
        if kind in ("weight", "weight_packed"):
            right = part.shape[:1] == (rows,) and part.dtype == dtypes.get(head, "I32")
        elif kind == "weight_scale" and part.numel > 1:  # of rows, or of blocks of 128
            right = part.shape[0] in (rows, -(-rows // 128))
        if not right:
            raise ModelError(
                f"'{part.name}' {part.shape} {part.dtype} is no part of a {head} LM head of {rows} "
                "rows. Download it again, or quantise the original again."
            )
