"""Write quantised checkpoints that vLLM loads as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molmo_edge.quantize.run import Quantized, quantize

__all__ = ["Quantized", "quantize"]


def __getattr__(name: str) -> Any:
    # torch is imported on first use only.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from molmo_edge.quantize import run

    return getattr(run, name)
