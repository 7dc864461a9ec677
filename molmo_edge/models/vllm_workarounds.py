"""Workarounds for defects of vLLM that leave no other way, each with the test that says when to go.

Every workaround states the defect, the versions with it and its test in tests/models.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
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
        with warnings.catch_warnings():
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
