"""Translate third-party exceptions into MolmoEdgeError.

By class alone, resolved by name so that nothing is imported for it. vLLM's messages may quote the
prompt, a path or an object's address: they stay in the log and in the chained exception.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias

from molmo_edge.errors import (
    ConfigError,
    EngineStartError,
    GenerationError,
    InputError,
    MissingDependencyError,
    ModelError,
    MolmoEdgeError,
)

logger = logging.getLogger("molmo_edge")

Stage: TypeAlias = Literal["build", "render", "add"]

# What a class, or the nearest of its base classes, means while the engine starts and for a request.
TABLE: Mapping[str, tuple[type[MolmoEdgeError], type[MolmoEdgeError]]] = {
    "vllm.exceptions.VLLMClientError": (ConfigError, InputError),
    "vllm.exceptions.VLLMNotFoundError": (ModelError, InputError),
    "pydantic_core._pydantic_core.ValidationError": (ConfigError, InputError),
    "safetensors._safetensors_rust.SafetensorError": (ModelError, GenerationError),
    "builtins.ImportError": (MissingDependencyError, GenerationError),
    "builtins.NotImplementedError": (ConfigError, GenerationError),
    # What vLLM or a tokenizer raises for input that has no class of its own.
    "builtins.ValueError": (EngineStartError, InputError),
    "builtins.TypeError": (EngineStartError, InputError),
    "builtins.Exception": (EngineStartError, GenerationError),
}
_NO_MEMORY = (
    "The device is out of memory. Close what else uses it, lower max_model_len, max_num_seqs, "
    "gpu_memory_utilization or kv_cache_memory_gb, or choose a precision with fewer bytes. "
)


@contextmanager
def mapped(stage: Stage) -> Iterator[None]:
    """Raise any exception but ours as one of ours, with the original chained.

    Args:
        stage: ``"build"`` while the engine starts; ``"render"`` or ``"add"`` for a request.
    """
    try:
        yield
    except MolmoEdgeError:
        raise
    except Exception as exc:
        raise _translate(exc, stage) from exc


def advice(exc: BaseException) -> str:
    """Return a sentence on how to avoid this failure, with a space after it, or ``""``."""
    kinds = {type(link).__name__ for link in _chain(exc)}
    return _NO_MEMORY if kinds & {"MemoryError", "OutOfMemoryError"} else ""


def drop_frames(exc: BaseException) -> None:
    """Clear the local variables that a traceback keeps alive, an engine's tensors among them.

    Called by the function that caught it, whose own frame leaves the traceback.
    """
    if exc.__traceback__ is not None:
        exc.__traceback__ = exc.__traceback__.tb_next
    for link in _chain(exc):
        if link.__traceback__ is not None:
            traceback.clear_frames(link.__traceback__)


def _translate(exc: Exception, stage: Stage) -> MolmoEdgeError:
    name = type(exc).__name__
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(exc).__mro__)
    at_start, for_request = next(TABLE[name] for name in names if name in TABLE)
    if stage == "build":
        logger.error("vLLM could not start the engine: %s: %s", name, exc)
        if issubclass(at_start, MissingDependencyError):
            package = getattr(exc, "name", None) or name
            return at_start(
                f"A package that vLLM needs is missing or broken ({package}). Install the build "
                "that belongs to the installed torch; `molmo-edge doctor` checks the whole set."
            )
        return at_start(
            f"vLLM could not start the engine: {name}. {advice(exc)}"
            "The log and the chained exception hold vLLM's own message."
        )
    logger.debug("vLLM refused a request (%s): %s: %s", stage, name, exc)
    if advice(exc):
        return GenerationError(
            f"Not enough memory for this request ({name}). Lower max_crops, or run fewer requests "
            "at once."
        )
    failed = "could not be prepared" if stage == "render" else "was refused by vLLM"
    return for_request(f"The request {failed}: {name}. The chained exception says why.")


def _chain(exc: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = exc
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
