"""A quantised LM head in vLLM, for both Molmo families."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear

from molmo_edge.devices.shapes import stored_head

_MULTIPLE = 64  # of rows, which kernels ask for; OLMo's vocabulary of 100,278 is none


class LinearHead(ReplicatedLinear):  # type: ignore[misc]
    """The head as a linear layer, with rows of zeros after the vocabulary.

    vLLM's `ParallelLMHead` is none of the "Linear" layers that compressed-tensors' configurations
    target.
    """

    def weight_loader(self, param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        if loaded_weight.ndim and len(loaded_weight) < len(param):
            param.data[len(loaded_weight) :] = 0
            param.data[: len(loaded_weight)].copy_(loaded_weight)
        else:
            super().weight_loader(param, loaded_weight)


def quantised_head(
    vllm_config: VllmConfig, rows: int, columns: int, name: str
) -> LinearHead | None:
    """The head of a checkpoint that has it quantised, under this name; None for all others."""
    hf_config = vllm_config.model_config.hf_config
    quantization = getattr(hf_config, "quantization_config", None)
    config = {"model_type": hf_config.model_type, "quantization_config": quantization}
    if stored_head(config) is None:
        return None
    return LinearHead(
        columns,
        -(-rows // _MULTIPLE) * _MULTIPLE,
        bias=False,
        quant_config=vllm_config.quant_config,
        prefix=name,
    )
