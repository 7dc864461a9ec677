"""Caches on disk that make a second start shorter: where they are and how full.

One root holds them all: torch.compile and inductor (below vLLM's), Triton, FlashInfer and what the
CUDA driver compiles from PTX. What is compiled for one vLLM, torch or GPU is of no use to another,
so the folders are keyed by them. A variable that the user has set wins over the root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.sources import Sources

_MAX_FILES = 20_000  # a doctor takes a second, not a minute

# What it is, the variable that moves it, its folder below the root, and what only a GPU fills.
_KINDS = (
    ("vLLM and torch.compile", "VLLM_CACHE_ROOT", "vllm", False),
    # vLLM moves this one below its own as soon as it compiles.
    ("torch inductor", "TORCHINDUCTOR_CACHE_DIR", "inductor", False),
    ("Triton", "TRITON_CACHE_DIR", "triton", True),
    ("FlashInfer", "FLASHINFER_WORKSPACE_BASE", "flashinfer", True),
    ("CUDA driver's compiler", "CUDA_CACHE_PATH", "cuda", True),
)
CACHE_VARIABLES = frozenset(variable for _, variable, _, _ in _KINDS)
"""Names that ``cache_environment`` may give; each value is a folder."""


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


def cache_environment(
    root: Path, device: DeviceInfo, versions: Mapping[str, str | None]
) -> dict[str, str]:
    """Environment variables that put every cache of compiled code below ``root``.

    Args:
        root: molmo_edge's cache folder.
        device: that the code is compiled for.
        versions: of "vllm" and "torch", ``None`` or missing where not installed.
    """
    folder = root.expanduser().absolute() / "compiled" / cache_key(device, versions)
    return {
        variable: str(folder / place)
        for _, variable, place, for_gpu in _KINDS
        if device.kind == "cuda" or not for_gpu
    }


def cache_key(device: DeviceInfo, versions: Mapping[str, str | None]) -> str:
    """Folder name for what compiled code depends on: vLLM, torch, and the GPU or processor."""
    parts = [f"{name}-{versions.get(name) or 'unknown'}" for name in ("vllm", "torch")]
    if device.kind == "cuda":
        parts += [device.sm or "sm_unknown", device.name]
    else:
        parts += ["cpu", device.cpu_name or device.machine or "unknown"]
    return re.sub(r"[^a-z0-9._+]+", "-", "-".join(parts).lower()).strip("-")[:150]


def caches(
    src: Sources,
    device: DeviceInfo,
    cache_dir: Path | None = None,
    versions: Mapping[str, str | None] | None = None,
) -> list[Cache]:
    """molmo_edge's cache root and the caches of what it uses, for this kind of device."""
    env = src.environ
    home = env.get("HOME") or (str(Path.home()) if src.live else "/root")
    xdg = env.get("XDG_CACHE_HOME") or f"{home}/.cache"
    own = str(cache_dir) if cache_dir else env.get("MOLMO_EDGE_CACHE_DIR") or f"{xdg}/molmo_edge"
    places = cache_environment(Path(own), device, versions or {}) | dict(env)
    rows = [("molmo_edge", own, "MOLMO_EDGE_CACHE_DIR")]
    rows += [
        (what, places[variable], variable)
        for what, variable, _, for_gpu in _KINDS
        if device.kind == "cuda" or not for_gpu
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
