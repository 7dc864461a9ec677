"""Workarounds for defects and old versions of vLLM.

Every workaround for a defect states it, the versions with it and its test in tests/models, which
says when it can go.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_LLVMLITE_TABLE = "llvmlite.binding.ffi"
_TORCHVISION_PROCESSOR = "transformers.models.gemma3.image_processing_gemma3"


@contextmanager
def llvmlite_hidden() -> Iterator[None]:
    """Let vLLM's CPU backend start in a process that has imported numba.

    Defect: to install its kernels the backend reads the attributes of every object of every loaded
    module (`vllm.triton_utils.dispatcher`). llvmlite's table of functions answers to any name, and
    the scan raises AttributeError. The same scan touches a deprecated name of torch.distributed.
    Versions: vLLM 0.30 to 0.32, CPU only.
    Test: test_vllms_kernel_scan_fails_on_llvmlite.
    """
    table = sys.modules.pop(_LLVMLITE_TABLE, None)
    try:
        ignore_scan_warning()
        yield
    finally:
        if table is not None:
            sys.modules[_LLVMLITE_TABLE] = table


def ignore_scan_warning() -> None:
    """Ignore what torch says when vLLM's scan touches its deprecated name."""
    warnings.filterwarnings("ignore", r".*torch\.distributed\.reduce_op", FutureWarning)


@contextmanager
def gemma3_without_torchvision() -> Iterator[None]:
    """Let vLLM's Gemma 3 be imported without torchvision.

    Defect: `gemma3_mm` imports transformers' torchvision image processor for an annotation, though
    transformers falls back to its PIL processor. PyPI's torchvision does not load beside a CPU
    build of torch.
    Versions: vLLM 0.26 to 0.32.
    Test: test_vllms_gemma3_needs_torchvision.
    """
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        yield
        return
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    module: Any = ModuleType(_TORCHVISION_PROCESSOR)
    module.Gemma3ImageProcessor = Gemma3ImageProcessorPil
    sys.modules[_TORCHVISION_PROCESSOR] = module
    try:
        yield
    finally:
        del sys.modules[_TORCHVISION_PROCESSOR]


def adapt_processor(processor: type[Any]) -> type[Any]:
    """Adapt a multimodal processor, written for the hooks of vLLM 0.32, to the installed vLLM.

    0.32 calls it for images (`_call_hf_processor`) and for a prompt's token ids
    (`_postprocess_prompt`) separately, and inserts the image tokens into the prompt itself. 0.26,
    which one GPU check of `benchmarks/` runs on, calls one hook for text and images together and
    another for token ids, and asks whether the image tokens are in the prompt already. Recognised
    by its hooks, not by its number: a vendor's build may carry parts of another version.
    """
    if not hasattr(processor, "_apply_hf_processor_tokens_only"):
        return processor

    class Adapted(processor):  # type: ignore[misc]
        """The hooks of vLLM 0.26 over those of 0.32."""

        def _call_hf_processor(
            self,
            prompt: str,
            mm_data: Mapping[str, object],
            mm_kwargs: Mapping[str, object],
            tok_kwargs: Mapping[str, object],
        ) -> Any:
            from transformers import BatchFeature

            data = BatchFeature({})
            if mm_data:
                data = super()._call_hf_processor(mm_data, mm_kwargs)
            tokenizer = self.info.get_tokenizer()
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            data["input_ids"] = [self._postprocess_prompt(ids)]
            return data

        def _hf_processor_applies_updates(self, *args: object, **kwargs: object) -> bool:
            return False

        def _apply_hf_processor_tokens_only(self, prompt_tokens: list[int]) -> list[int]:
            ids: list[int] = self._postprocess_prompt(prompt_tokens)
            return ids

    Adapted.__name__ = processor.__name__
    Adapted.__qualname__ = processor.__qualname__
    return Adapted


def prefill_in_one_step(architecture: str) -> None:
    """Have vLLM compute every prompt of an architecture in one step, before any engine is built.

    Defect: where image tokens see later ones, no step may end among them. vLLM has
    `disable_chunked_mm_input` for it, which the CPU platform does not set, and which fails when a
    step before ended right in front of the item. Registered where vLLM adapts the configuration to
    its own models.
    Versions: vLLM 0.26 to 0.32.
    Test: test_vllm_splits_an_item_that_a_step_ended_before.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class PrefillInOneStep(VerifyAndUpdateConfig):  # type: ignore[misc]
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            scheduler = vllm_config.scheduler_config
            # Room for the longest prompt beside a token of each running request.
            room = vllm_config.model_config.max_model_len + scheduler.max_num_seqs
            tokens = max(scheduler.max_num_batched_tokens, room)
            scheduler.max_num_batched_tokens = tokens
            scheduler.max_num_encoder_input_tokens = tokens
            scheduler.encoder_cache_size = tokens
            scheduler.enable_chunked_prefill = False
            scheduler.disable_chunked_mm_input = True

    MODELS_CONFIG_MAP[architecture] = PrefillInOneStep
