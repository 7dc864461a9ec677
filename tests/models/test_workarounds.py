"""Each workaround is still needed, and works."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def scan(hidden: bool) -> str:
    code = SCAN.format(hidden=hidden)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


@pytest.mark.slow
def test_vllms_kernel_scan_fails_on_llvmlite() -> None:
    pytest.importorskip("vllm")
    assert "AttributeError: '_lib_fn_wrapper'" in scan(hidden=False)  # else drop the workaround
    stderr = scan(hidden=True)
    assert "Error" not in stderr and "FutureWarning" not in stderr
