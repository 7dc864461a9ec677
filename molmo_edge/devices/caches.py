"""Caches on disk that make a second start shorter: where they are and how full.

What fills them and how they are keyed is not known here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.sources import Sources

_MAX_FILES = 20_000  # a doctor takes a second, not a minute


@dataclass(frozen=True)
class Cache:
    """One cache.

    Attributes:
        what: whose it is.
        path: its folder.
        size_bytes: of its files, at least: counting stops after 20,000; ``None`` if the folder
            is not there.
        writable: whether it, or the nearest folder above it, can be written.
        variable: environment variable that moves it.
    """

    what: str
    path: str
    size_bytes: int | None
    writable: bool
    variable: str


def caches(src: Sources, device: DeviceInfo, cache_dir: Path | None = None) -> list[Cache]:
    """molmo_edge's cache root and the caches of what it uses, for this kind of device."""
    env = src.environ
    home = env.get("HOME") or (str(Path.home()) if src.live else "/root")
    xdg = env.get("XDG_CACHE_HOME") or f"{home}/.cache"
    own = str(cache_dir) if cache_dir else env.get("MOLMO_EDGE_CACHE_DIR") or f"{xdg}/molmo_edge"
    flashinfer = env.get("FLASHINFER_WORKSPACE_BASE") or home
    rows = [
        ("molmo_edge", own, "MOLMO_EDGE_CACHE_DIR"),
        ("vLLM and torch.compile", env.get("VLLM_CACHE_ROOT") or f"{xdg}/vllm", "VLLM_CACHE_ROOT"),
    ]
    if device.kind == "cuda":
        triton = env.get("TRITON_CACHE_DIR") or f"{home}/.triton/cache"
        cuda = env.get("CUDA_CACHE_PATH") or f"{home}/.nv/ComputeCache"
        rows += [
            ("Triton", triton, "TRITON_CACHE_DIR"),
            ("FlashInfer", f"{flashinfer}/.cache/flashinfer", "FLASHINFER_WORKSPACE_BASE"),
            ("CUDA driver's compiler", cuda, "CUDA_CACHE_PATH"),
        ]
    return [
        Cache(what, path, _size(src.path(path)), _writable(src.path(path)), variable)
        for what, path, variable in rows
    ]


def _size(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    total = 0
    for count, size in enumerate(_file_sizes(folder)):
        total += size
        if count >= _MAX_FILES:
            break
    return total


def _file_sizes(folder: Path) -> Iterator[int]:
    for path, _, names in os.walk(folder, onerror=None):
        for name in names:
            try:
                yield Path(path, name).lstat().st_size
            except OSError:
                continue


def _writable(folder: Path) -> bool:
    for candidate in (folder, *folder.parents):
        try:
            if candidate.exists():
                return candidate.is_dir() and os.access(candidate, os.W_OK | os.X_OK)
        except OSError:
            return False
    return False
