"""Each workaround is still needed, and works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import BatchFeature
from transformers.utils import is_torchvision_available

from molmo_edge.models.vllm_workarounds import adapt_processor

SCAN = """
import contextlib, sys, types, warnings
import numba
from vllm.triton_utils.dispatcher import register_kernels
from molmo_edge.models.vllm_workarounds import llvmlite_hidden

module = types.ModuleType("kernels")
sys.modules["kernels"] = module
module.kernel = lambda x: x
with llvmlite_hidden() if {hidden} else contextlib.nullcontext():
    register_kernels({{"kernels.kernel": lambda x: x}})
assert "llvmlite.binding.ffi" in sys.modules
"""


def errors_of(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return run.stderr


@pytest.mark.slow
def test_vllms_kernel_scan_fails_on_llvmlite() -> None:
    pytest.importorskip("vllm")
    # Else drop the workaround.
    assert "AttributeError: '_lib_fn_wrapper'" in errors_of(SCAN.format(hidden=False))
    stderr = errors_of(SCAN.format(hidden=True))
    assert "Error" not in stderr and "FutureWarning" not in stderr


@pytest.mark.slow
@pytest.mark.skipif(is_torchvision_available(), reason="the defect shows only without torchvision")
def test_vllms_gemma3_needs_torchvision() -> None:
    stderr = errors_of("import vllm.model_executor.models.gemma3_mm")
    assert "torchvision" in stderr  # else drop the workaround


def test_vllms_cpu_kernel_loses_the_temperatures_of_drafted_tokens() -> None:
    kernels = pytest.importorskip("vllm.utils.cpu_triton_utils")
    import torch
    import vllm._C  # noqa: F401

    expanded, ends = torch.full((3,), -7.0), torch.tensor([1, 3], dtype=torch.int32)
    kernels._expand_kernel_impl(expanded, torch.tensor([0.5, 2.0]), ends, 0, 1)
    # Else allow sampling with drafts again (engine/vllm_engine.py).
    assert expanded.tolist() != [0.5, 2.0, 2.0]


class For32:
    """A processor written for vLLM 0.32."""

    info = SimpleNamespace(
        get_tokenizer=lambda: SimpleNamespace(
            encode=lambda text, add_special_tokens: [ord(letter) for letter in text]
        )
    )

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> Any:
        return BatchFeature({"images": hf_data["images"], "crops": hf_kwargs["max_crops"]})

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        return prompt if prompt[:1] == [1] else [1, *prompt]


class For26(For32):
    """The same over a base class of vLLM 0.26."""

    def _apply_hf_processor_tokens_only(self, prompt_tokens: list[int]) -> list[int]:
        return prompt_tokens


def test_vllm_026_gets_text_and_images_from_one_hook_and_newer_ones_the_class_as_it_is() -> None:
    assert adapt_processor(For32) is For32
    processor = adapt_processor(For26)()
    data = processor._call_hf_processor(
        prompt="ab", mm_data={"images": [7]}, mm_kwargs={"max_crops": 3}, tok_kwargs={}
    )
    assert dict(data) == {"input_ids": [[1, 97, 98]], "images": [7], "crops": 3}
    data = processor._call_hf_processor(prompt="", mm_data={}, mm_kwargs={}, tok_kwargs={})
    assert dict(data) == {"input_ids": [[1]]}
    assert processor._apply_hf_processor_tokens_only([5]) == [1, 5]
    assert not processor._hf_processor_applies_updates(prompt_text="", mm_items=None)
