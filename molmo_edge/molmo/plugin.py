"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in every process."""

from __future__ import annotations

ARCHITECTURE = "MolmoForCausalLM"
_MODEL = "molmo_edge.molmo.model:MolmoForCausalLM"
_STOCK = "vllm.model_executor.models.molmo:MolmoForCausalLM"


def register() -> None:
    """Makes vLLM load Molmo 1 with our config, processor and model; safe to call again."""
    from molmo_edge.engine.vllm_mends import mend_kernel_scan

    # Our processor resizes with numba before vLLM's CPU worker starts.
    mend_kernel_scan()
    register_with_transformers()
    use_model(stock=False)


def register_with_transformers() -> None:
    """Makes transformers' Auto classes read Molmo 1's files with our classes."""
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

    from molmo_edge.molmo.config import MolmoConfig
    from molmo_edge.molmo.image_processor import MolmoImageProcessor
    from molmo_edge.molmo.processor import MolmoProcessor

    AutoConfig.register("molmo", MolmoConfig, exist_ok=True)
    AutoImageProcessor.register(
        MolmoConfig, image_processor_classes={"pil": MolmoImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(MolmoConfig, MolmoProcessor, exist_ok=True)


def use_model(*, stock: bool) -> None:
    """Chooses which model engines built from now on in this process use: vLLM's own, or ours."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, _STOCK if stock else _MODEL)
