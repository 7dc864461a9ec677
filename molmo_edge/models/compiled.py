"""Functions compiled for this CPU with numba, where it is installed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

logger = logging.getLogger("molmo_edge")

# More threads gain little, and each costs as much to start as some rows to filter.
MAX_THREADS = 8


@cache
def compiled_kernel(function: Callable[..., None]) -> Callable[..., None] | None:
    """Return `function` in machine code, without the interpreter's lock; None without numba.

    The first call compiles, about a second; later processes read numba's cache on disk.
    """
    try:
        import numba  # type: ignore[import-untyped, unused-ignore]
    except (ImportError, SystemError) as exc:  # missing, or for another numpy
        logger.warning("Without numba, images are resized several times slower (%s).", exc)
        return None
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}}
    plain: Callable[..., None] = numba.njit(**options)(function)
    try:
        cached: Callable[..., None] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no directory for its cache
        return plain

    def kernel(*args: Any) -> None:
        try:
            cached(*args)
        except Exception:  # its cache is damaged, or the disk full
            plain(*args)

    return kernel


def run_in_threads(
    kernel: Callable[..., None], calls: Iterable[tuple[Any, ...]], threads: int
) -> None:
    """Run `kernel` once with each tuple of arguments, `threads` at a time."""
    with ThreadPoolExecutor(threads, "molmo-edge-resize") as pool:
        list(pool.map(kernel, *zip(*calls, strict=True)))


def row_ranges(rows: int, parts: int) -> list[tuple[int, int]]:
    """Cut `rows` into at most `parts` ranges (begin, end)."""
    step = -(-rows // parts)
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
