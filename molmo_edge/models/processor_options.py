"""What vLLM's users may set through `mm_processor_kwargs`."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from molmo_edge.errors import ConfigError

# Added by vLLM itself; they have no meaning for Molmo's processors.
_FROM_VLLM = {
    "truncation", "tokenizer", "device", "text_kwargs", "images_kwargs", "videos_kwargs",
}  # fmt: skip


def processor_options(
    info: Any, kwargs: Mapping[str, object], known: Set[str], model: str
) -> dict[str, Any]:
    """Return the engine's `mm_processor_kwargs`, overridden by those of one request.

    `info` is vLLM's processing info of the model, `known` the names that the model takes. Raises
    ConfigError for an unknown name.
    """
    options = dict(info.ctx.get_merged_mm_kwargs(kwargs))
    options |= options.pop("images_kwargs", {})
    if unknown := sorted(options.keys() - known - _FROM_VLLM):
        raise ConfigError(
            f"mm_processor_kwargs: unknown {', '.join(unknown)}; {model} takes "
            f"{', '.join(sorted(known))}."
        )
    return {name: value for name, value in options.items() if name in known}
