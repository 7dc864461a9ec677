"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in every process."""

from __future__ import annotations


def register() -> None:
    """Make vLLM run Molmo 1 and 2 with this package's classes; may repeat."""
    from molmo_edge.engine.async_engine import prepare_child
    from molmo_edge.models.molmo import family as molmo
    from molmo_edge.models.molmo2 import family as molmo2

    molmo.register()
    molmo2.register()
    # In an engine's own process, the rest of what its parent did.
    prepare_child()
