"""Write quantised checkpoints that vLLM loads as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from molmo_edge.errors import MissingDependencyError

if TYPE_CHECKING:
    from molmo_edge.quantize.run import Quantized, quantize

__all__ = ["Quantized", "quantize"]


def __getattr__(name: str) -> Any:
    # torch is imported on first use only.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from molmo_edge.quantize import run
    except ImportError as exc:
        raise MissingDependencyError(
            "Quantising needs torch and compressed-tensors, which come with vLLM: pip install "
            '"molmo-edge[cuda]" or "molmo-edge[cpu]".'
        ) from exc
    return getattr(run, name)
