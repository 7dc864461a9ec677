"""Write quantised checkpoints that vLLM loads as they are."""

from __future__ import annotations

from molmo_edge.errors import MissingDependencyError

try:
    from molmo_edge.quantize.run import Quantized, quantize
except ImportError as exc:
    raise MissingDependencyError(
        "Quantising needs torch and compressed-tensors, which come with vLLM: pip install "
        '"molmo-edge[cuda]" or "molmo-edge[cpu]".'
    ) from exc

__all__ = ["Quantized", "quantize"]
