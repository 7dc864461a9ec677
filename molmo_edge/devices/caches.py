"""Caches of compiled code on disk, which make a second start shorter.

One root holds them all, in a directory per vLLM, torch and GPU, because code compiled for one is
useless to another. A variable that the user has set takes precedence over the root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from molmo_edge.devices.detect import DeviceInfo
from molmo_edge.errors import ConfigError

# Environment variable → directory below the root, of each library with a cache.
_DIRECTORIES = {
    "VLLM_CACHE_ROOT": "vllm",
    # vLLM moves this one below its own as soon as it compiles.
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}
_GPU_DIRECTORIES = {
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
}
CACHE_VARIABLES = frozenset(_DIRECTORIES | _GPU_DIRECTORIES)
"""Variables that ``cache_environment`` may set; each value is a directory."""


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CACHE_HOME/molmo_edge`, or `~/.cache/molmo_edge`. Raises ConfigError without a home."""
    if root := environ.get("XDG_CACHE_HOME"):
        return Path(root) / "molmo_edge"
    try:
        return Path(environ.get("HOME") or Path.home()) / ".cache" / "molmo_edge"
    except RuntimeError:
        raise ConfigError(
            "This user has no home directory for the cache: set HOME, or name a directory with "
            "cache_dir or MOLMO_EDGE_CACHE_DIR."
        ) from None


def cache_environment(
    root: Path, device: DeviceInfo, versions: Mapping[str, str | None]
) -> dict[str, str]:
    """Return environment variables that put every cache of compiled code below ``root``.

    ``versions`` are those of "vllm" and "torch", ``None`` or missing where not installed.
    """
    parts = [f"{name}-{versions.get(name) or 'unknown'}" for name in ("vllm", "torch")]
    parts += [(device.sm or "sm_unknown") if device.kind == "cuda" else "cpu", device.name]
    key = re.sub(r"[^a-z0-9._+]+", "-", "-".join(parts).lower()).strip("-")[:150]
    directory = root.absolute() / "compiled" / key
    names = _DIRECTORIES | (_GPU_DIRECTORIES if device.kind == "cuda" else {})
    return {variable: str(directory / name) for variable, name in names.items()}
