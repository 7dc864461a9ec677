"""What vLLM's users may set through `mm_processor_kwargs`."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from molmo_edge.errors import ConfigError

FROM_VLLM = frozenset({"truncation", "tokenizer", "device", "text_kwargs", "images_kwargs"})
"""Added by vLLM itself; they have no meaning for Molmo's processors."""


def processor_options(
    info: Any,
    kwargs: Mapping[str, object],
    known: Set[str],
    model: str,
    ignored: Set[str] = FROM_VLLM,
) -> dict[str, Any]:
    """Return the engine's `mm_processor_kwargs`, overridden by one request's.

    Args:
        info: vLLM's processing info of the model.
        kwargs: those of the request.
        known: names that the model takes.
        model: its name, for messages.
        ignored: names that are dropped.

    Raises:
        ConfigError: an unknown name.
    """
    options = dict(info.ctx.get_merged_mm_kwargs(kwargs))
    options |= options.pop("images_kwargs", {})
    for name in ignored:
        options.pop(name, None)
    if unknown := sorted(options.keys() - known):
        raise ConfigError(
            f"mm_processor_kwargs: unknown {', '.join(unknown)}; {model} takes "
            f"{', '.join(sorted(known))}."
        )
    return options
