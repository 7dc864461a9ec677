"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in every process."""

from __future__ import annotations

ARCHITECTURE = "MolmoForCausalLM"
_MODEL = "molmo_edge.models.molmo.vllm_model:MolmoForCausalLM"
_STOCK = "vllm.model_executor.models.molmo:MolmoForCausalLM"

_stock = False


def register() -> None:
    """Makes vLLM load Molmo 1 with our config, processor and model; safe to call again."""
    from molmo_edge.engine.placement import prepare_child
    from molmo_edge.engine.vllm_mends import mend_kernel_scan

    # Our processor resizes with numba before vLLM's CPU worker starts.
    mend_kernel_scan()
    register_with_transformers()
    _register_model()
    # In an engine's own process, the rest of what its parent did.
    prepare_child()


def register_with_transformers() -> None:
    """Makes transformers' Auto classes read Molmo 1's files with our classes."""
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

    from molmo_edge.models.molmo.config import MolmoConfig
    from molmo_edge.models.molmo.image_processor import MolmoImageProcessor
    from molmo_edge.models.molmo.processor import MolmoProcessor

    AutoConfig.register("molmo", MolmoConfig, exist_ok=True)
    AutoImageProcessor.register(
        MolmoConfig, image_processor_classes={"pil": MolmoImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(MolmoConfig, MolmoProcessor, exist_ok=True)


def use_model(*, stock: bool) -> None:
    """Chooses which model engines built from now on in this process use: vLLM's own, or ours."""
    global _stock
    _stock = stock
    _register_model()


def prepare() -> None:
    """Hands vLLM the model's class before an engine is built in this process.

    By name, vLLM would import it in one more process first: seconds of every start whose caches are
    empty.
    """
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # registers the name, and must not come later
    if not _stock:
        from molmo_edge.models.molmo.vllm_model import MolmoForCausalLM

        ModelRegistry.register_model(ARCHITECTURE, MolmoForCausalLM)


def _register_model() -> None:
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, _STOCK if _stock else _MODEL)
