"""What has to be put right in vLLM itself for molmo_edge to run in it."""

from __future__ import annotations

import sys

_LLVM_TABLE = "llvmlite.binding.ffi"


def mend_kernel_scan() -> None:
    """Lets vLLM's CPU backend start in a process where numba was imported before.

    The backend asks every object of every loaded module for its attributes. llvmlite's table of
    functions has an answer to any name, also to that, and the scan dies of it.
    """
    try:
        from vllm.triton_utils import dispatcher
    except ImportError:  # another version of vLLM, which has no such scan
        return
    scan = getattr(dispatcher, "_rebind_kernels", None)
    if scan is None or getattr(scan, "mended", False):
        return

    def without_llvmlite(overrides: object) -> None:
        table = sys.modules.pop(_LLVM_TABLE, None)
        try:
            scan(overrides)
        finally:
            if table is not None:
                sys.modules[_LLVM_TABLE] = table

    without_llvmlite.mended = True  # type: ignore[attr-defined]
    dispatcher._rebind_kernels = without_llvmlite
