"""vLLM's CPU backend starts although numba is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import numba
from vllm.triton_utils import dispatcher
if {mend}:
    from molmo_edge.engine.vllm_mends import mend_kernel_scan
    mend_kernel_scan()
    mend_kernel_scan()
import sys, types
here = types.ModuleType("here")
sys.modules["here"] = here
old, new = object(), object()
here.kernel = old
dispatcher._rebind_kernels([(old, new)])
assert here.kernel is new
assert "llvmlite.binding.ffi" in sys.modules
"""


def scan(mend: bool) -> str:
    code = CODE.format(mend=mend)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


@pytest.mark.slow
def test_the_scan_for_kernels_survives_llvmlite() -> None:
    pytest.importorskip("vllm")
    assert "AttributeError: '_lib_fn_wrapper'" in scan(mend=False)  # else it is needed no more
    assert "Error" not in scan(mend=True)
