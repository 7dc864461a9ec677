"""Memory that nobody uses any more goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def trim() -> None:
    """Frees what only cycles hold, and makes the C library hand freed memory back.

    glibc keeps it otherwise, by the gigabyte: where other programs, or a GPU that shares the
    memory, could use it.
    """
    gc.collect()
    if sys.platform == "linux":
        # None but glibc has it.
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)
