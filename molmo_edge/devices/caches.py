"""Caches of compiled code on disk, which make a second start shorter.

One root holds them all, in a directory per vLLM, torch and GPU, because code compiled for one is
useless to another. A variable that the user has set takes precedence over the root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.sources import Sources

_MAX_FILES = 20_000  # keeps doctor fast

# Owner, environment variable, directory below the root, and whether only a GPU fills it.
_KINDS = (
    ("vLLM and torch.compile", "VLLM_CACHE_ROOT", "vllm", False),
    # vLLM moves this one below its own as soon as it compiles.
    ("torch inductor", "TORCHINDUCTOR_CACHE_DIR", "inductor", False),
    ("Triton", "TRITON_CACHE_DIR", "triton", True),
    ("FlashInfer", "FLASHINFER_WORKSPACE_BASE", "flashinfer", True),
    ("CUDA driver's compiler", "CUDA_CACHE_PATH", "cuda", True),
)
CACHE_VARIABLES = frozenset(variable for _, variable, _, _ in _KINDS)
"""Variables that ``cache_environment`` may set; each value is a directory."""


@dataclass(frozen=True)
class Cache:
    """One cache directory.

    Attributes:
        what: its owner.
        path: the directory.
        size_bytes: of its files, a lower bound beyond 20,000 files; ``None`` if it does not exist.
        writable: whether it, or its nearest existing parent, can be written.
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
    """Return environment variables that put every cache of compiled code below ``root``.

    Args:
        root: molmo_edge's cache directory.
        device: the device that code is compiled for.
        versions: of "vllm" and "torch", ``None`` or missing where not installed.
    """
    parts = [f"{name}-{versions.get(name) or 'unknown'}" for name in ("vllm", "torch")]
    if device.kind == "cuda":
        parts += [device.sm or "sm_unknown", device.name]
    else:
        parts += ["cpu", device.name]
    key = re.sub(r"[^a-z0-9._+]+", "-", "-".join(parts).lower()).strip("-")[:150]
    directory = root.expanduser().absolute() / "compiled" / key
    return {variable: str(directory / name) for _, variable, name in _kinds(device)}


def caches(src: Sources, device: DeviceInfo, versions: Mapping[str, str | None]) -> list[Cache]:
    """Return molmo_edge's cache root and the caches of its dependencies on this kind of device."""
    env = src.environ
    xdg = env.get("XDG_CACHE_HOME") or f"{env.get('HOME') or Path.home()}/.cache"
    own = env.get("MOLMO_EDGE_CACHE_DIR") or f"{xdg}/molmo_edge"
    paths = cache_environment(Path(own), device, versions) | dict(env)
    rows = [("molmo_edge", "MOLMO_EDGE_CACHE_DIR", own)]
    rows += [(what, variable, paths[variable]) for what, variable, _ in _kinds(device)]
    return [
        Cache(what, path, _size(src.path(path)), _writable(src.path(path)), variable)
        for what, variable, path in rows
    ]


def _kinds(device: DeviceInfo) -> list[tuple[str, str, str]]:
    return [kind[:3] for kind in _KINDS if device.kind == "cuda" or not kind[3]]


def _size(directory: Path) -> int | None:
    if not directory.is_dir():
        return None
    files = (Path(path, name) for path, _, names in os.walk(directory) for name in names)
    total = 0
    for file in islice(files, _MAX_FILES):
        with suppress(OSError):  # another process may delete it
            total += file.lstat().st_size
    return total


def _writable(directory: Path) -> bool:
    for candidate in (directory, *directory.parents):
        if os.path.exists(candidate):  # noqa: PTH110  never raises, unlike Path.exists
            return candidate.is_dir() and os.access(candidate, os.W_OK | os.X_OK)
    return False
