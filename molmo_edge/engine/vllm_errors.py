"""Other people's exceptions to ours: one context manager, and the table it goes by.

Classes are told by name, so nothing is imported for it. Messages are our own words: those of vLLM
may quote the prompt, a path or an object's address; they stay in the chained error.
"""

from __future__ import annotations

import re
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
    QueueFull,
)

Stage: TypeAlias = Literal["build", "render", "add"]

# What a foreign class means while the engine is built, and what it means for one request.
FOREIGN: Mapping[str, tuple[type[MolmoEdgeError], type[MolmoEdgeError]]] = {
    "vllm.exceptions.VLLMError": (EngineStartError, GenerationError),
    "vllm.exceptions.VLLMClientError": (ConfigError, InputError),
    "vllm.exceptions.VLLMServerError": (EngineStartError, GenerationError),
    "vllm.exceptions.VLLMValidationError": (ConfigError, InputError),
    "vllm.exceptions.VLLMNotFoundError": (ModelError, InputError),
    "vllm.exceptions.LoRAAdapterNotFoundError": (ModelError, InputError),
    "vllm.exceptions.VLLMUnprocessableEntityError": (ConfigError, InputError),
    "vllm.exceptions.GenerationError": (EngineStartError, GenerationError),
    "vllm.exceptions.RetryableRequestError": (EngineStartError, GenerationError),
    "vllm.exceptions.GracefulHTTPError": (EngineStartError, GenerationError),
    "vllm.exceptions.QueueOverflowError": (EngineStartError, QueueFull),
    "vllm.exceptions.MaxQueuedTokensError": (EngineStartError, QueueFull),
    "vllm.exceptions.ProfilerAlreadyActiveError": (EngineStartError, GenerationError),
    "vllm.v1.engine.exceptions.EngineGenerateError": (EngineStartError, GenerationError),
    "vllm.v1.engine.exceptions.EngineDeadError": (EngineStartError, GenerationError),
    "vllm.multimodal.cache.base.MultiModalCacheMissError": (EngineStartError, GenerationError),
    "vllm.renderers.chat_utils.ChatTemplateResolutionError": (ModelError, InputError),
    "pydantic_core._pydantic_core.ValidationError": (ConfigError, InputError),
    "torch.OutOfMemoryError": (EngineStartError, GenerationError),
    "torch.AcceleratorError": (EngineStartError, GenerationError),
    "safetensors._safetensors_rust.SafetensorError": (ModelError, GenerationError),
    "builtins.MemoryError": (EngineStartError, GenerationError),
    "builtins.ImportError": (MissingDependencyError, GenerationError),
    "builtins.NotImplementedError": (ConfigError, GenerationError),
    # Input that vLLM or the tokenizer found wrong without a class of its own for it.
    "builtins.ValueError": (EngineStartError, InputError),
    "builtins.TypeError": (EngineStartError, InputError),
    "builtins.Exception": (EngineStartError, GenerationError),
}

_NO_MEMORY = (
    "The device is out of memory. Close what else uses it, or lower max_model_len, max_num_seqs, "
    "gpu_memory_utilization or kv_cache_memory_gb, or take a precision with fewer bytes. "
)
# vLLM and torch say these in ValueError and RuntimeError; the first match wins.
_SAID: tuple[tuple[re.Pattern[str], type[MolmoEdgeError], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind, words)
    for pattern, kind, words in (
        (
            r"no available memory for the cache blocks|larger than the available KV cache",
            EngineStartError,
            "There is no room for the KV cache. Raise gpu_memory_utilization or "
            "kv_cache_memory_gb, or lower max_model_len or max_num_seqs. ",
        ),
        (
            r"(free|available) memory on (device|node)|less than desired (gpu|cpu) memory",
            EngineStartError,
            "Less memory is free than the engine was told to take. Close what else uses the "
            "device, or lower gpu_memory_utilization or kv_cache_memory_gb. ",
        ),
        (
            r"out of memory|can't allocate memory|cannot allocate memory|std::bad_alloc",
            EngineStartError,
            _NO_MEMORY,
        ),
        (
            r"is greater than the derived max_model_len|max_model_len",
            ConfigError,
            "max_model_len does not fit the model; lower it, or leave it unset. ",
        ),
        (
            r"attention backend|is not valid for this configuration|AttentionBackend",
            ConfigError,
            "No attention backend of this vLLM can do what was asked on this device. Leave "
            "attention_backend, mm_encoder_attn_backend and kv_cache_dtype unset, or name "
            "others. ",
        ),
        (
            r"kv.?cache.?dtype",
            ConfigError,
            "This device has no KV cache of the dtype that was asked for; set "
            "kv_cache_dtype=auto. ",
        ),
        (
            r"quantization",
            ConfigError,
            "vLLM cannot run this precision on this device; take another precision, or "
            "precision=auto. ",
        ),
        (
            r"bfloat16|float16|\bdtype\b",
            ConfigError,
            "This device or model cannot use the dtype that was asked for; set dtype=float16 or "
            "dtype=float32. ",
        ),
        (
            r"load.?format",
            ConfigError,
            "vLLM does not know this load_format; leave it at auto. ",
        ),
        (
            r"is already initialized|re-initialize CUDA in forked",
            EngineStartError,
            "CUDA was in use before this process was forked; start children with "
            'multiprocessing\'s "spawn" method. ',
        ),
        (
            r"cannot be multiplied|size mismatch|There is no module or parameter|not initialized "
            r"from checkpoint",
            ModelError,
            "The checkpoint's tensors do not fit its config.json. ",
        ),
    )
)


@contextmanager
def mapped(stage: Stage) -> Iterator[None]:
    """Lets our own errors through and turns any other into one of ours, chained.

    Args:
        stage: ``"build"`` while the engine starts; ``"render"`` and ``"add"`` on a request's way.

    Raises:
        MolmoEdgeError: never anything else, apart from what is no `Exception`.
    """
    try:
        yield
    except MolmoEdgeError:
        raise
    except Exception as exc:
        raise _ours(exc, stage) from exc


def advice(exc: BaseException) -> str:
    """A sentence on what to do about the end of an engine, with a space behind it, or ``""``."""
    return _NO_MEMORY if _lacks_memory(exc) else ""


def drop_frames(exc: BaseException) -> None:
    """Clears the local variables that a traceback keeps alive, an engine's tensors among them.

    Called by whoever caught it; their own frame leaves the traceback, since it lives on.
    """
    if exc.__traceback__ is not None:
        exc.__traceback__ = exc.__traceback__.tb_next
    for link in _chain(exc):
        if link.__traceback__ is not None:
            traceback.clear_frames(link.__traceback__)


def _ours(exc: Exception, stage: Stage) -> MolmoEdgeError:
    name = type(exc).__name__
    building, asking = _meaning(exc)
    if stage == "build":
        for link in _chain(exc):
            for said, kind, words in _SAID:
                if isinstance(link, ValueError | RuntimeError) and said.search(str(link)):
                    return kind(f"{words}The chained {name} says more.")
        if _lacks_memory(exc):
            return EngineStartError(f"{_NO_MEMORY}The chained {name} says more.")
        if issubclass(building, MissingDependencyError):
            return building(
                f"A package that vLLM needs is missing or broken ({_missing(exc)}). Install it "
                "for the torch that is installed; `molmo-edge doctor` looks at the whole set."
            )
        return building(f"The engine could not be built: {name}. The chained error says why.")
    if _lacks_memory(exc):
        return GenerationError(
            "There was no memory left for this request. Lower max_crops, or ask fewer at once. "
            f"The chained {name} says more."
        )
    parameter = getattr(exc, "parameter", None)
    about = f" about {parameter}" if isinstance(parameter, str) and parameter.isidentifier() else ""
    who = "The request could not be prepared" if stage == "render" else "The engine refused it"
    return asking(f"{who}: {name}{about}. The chained error says why.")


def _meaning(exc: Exception) -> tuple[type[MolmoEdgeError], type[MolmoEdgeError]]:
    for kind in type(exc).__mro__:
        found = FOREIGN.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return found
    return FOREIGN["builtins.Exception"]


def _lacks_memory(exc: BaseException) -> bool:
    return any(
        isinstance(link, MemoryError)
        or type(link).__name__ == "OutOfMemoryError"
        or (isinstance(link, RuntimeError) and "out of memory" in str(link).lower())
        for link in _chain(exc)
    )


def _chain(exc: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = exc
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _missing(exc: BaseException) -> str:
    for link in _chain(exc):
        if isinstance(link, ImportError) and link.name:
            return link.name
    return type(exc).__name__
