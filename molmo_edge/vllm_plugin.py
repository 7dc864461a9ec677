"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in every process."""

from __future__ import annotations


def register() -> None:
    """Make vLLM run Molmo 1 with this package's configuration, processor and model; may repeat."""
    from molmo_edge.engine.async_engine import prepare_child
    from molmo_edge.models.molmo.family import register as register_molmo

    register_molmo()
    # In an engine's own process, the rest of what its parent did.
    prepare_child()
