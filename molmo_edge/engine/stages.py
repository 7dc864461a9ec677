"""How long the parts of an engine's start take, as far as vLLM lets it be seen.

Two of vLLM's methods are timed while an engine is built in this process. A part stays unknown where
this vLLM does it elsewhere, or in another process. Knows nothing of models and settings.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

WEIGHTS, COMPILE, PROFILE, WARMUP = "weights", "compile", "profile", "warmup"

# What the executor has its worker do, in vLLM 0.26 and 0.32.
_PART_OF = {
    "determine_available_memory": PROFILE,
    "initialize_from_config": PROFILE,
    "compile_or_warm_up_model": WARMUP,
}


class Stages:
    """Collects seconds by part."""

    def __init__(self) -> None:
        self._seconds: dict[str, float | None] = dict.fromkeys((WEIGHTS, COMPILE, PROFILE, WARMUP))

    def seconds(self) -> dict[str, float | None]:
        """Seconds by part, None for what was not seen.

        weights: the model made, its weights read, quantised and laid out; compile: torch.compile, 0
        without it, None where it runs uncounted within the next two, as on a CPU; profile: memory
        measured and the KV cache made; warmup: kernels and graphs.
        """
        return dict(self._seconds)

    def add(self, part: str, seconds: float) -> None:
        self._seconds[part] = (self._seconds[part] or 0.0) + seconds


@contextmanager
def watched() -> Iterator[Stages]:
    """While this lasts, what vLLM does for an engine in this process is timed."""
    stages = Stages()

    def loading(load: Callable[..., Any]) -> Callable[..., Any]:
        def timed(loader: Any, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return load(loader, *args, **kwargs)
            finally:
                stages.add(WEIGHTS, time.perf_counter() - began)

        return timed

    def calling(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(executor: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            part = _PART_OF.get(method) if isinstance(method, str) else None
            if part is None:
                return call(executor, method, *args, **kwargs)
            began, compiled = time.perf_counter(), _compiled(executor)
            try:
                return call(executor, method, *args, **kwargs)
            finally:
                spent, now = time.perf_counter() - began, _compiled(executor)
                if compiled is not None and now is not None:
                    # It happens in the middle of one of the others.
                    compiling = min(max(0.0, now - compiled), spent)
                    if compiling or not _compiles(executor):
                        stages.add(COMPILE, compiling)
                    spent -= compiling
                stages.add(part, spent)

        return timed

    with ExitStack() as stack:
        loader = "vllm.model_executor.model_loader.base_loader", "BaseModelLoader", "load_model"
        executor = "vllm.v1.executor.uniproc_executor", "UniProcExecutor", "collective_rpc"
        for place, timed in ((loader, loading), (executor, calling)):
            _wrap(stack, *place, timed)
        yield stages


def _wrap(
    stack: ExitStack,
    module: str,
    owner: str,
    name: str,
    timed: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Puts a timed method in place of vLLM's own until `stack` ends; nothing where it has none."""
    try:
        cls = getattr(importlib.import_module(module), owner)
        original = vars(cls)[name]
    except (ImportError, AttributeError, KeyError):
        return
    setattr(cls, name, functools.wraps(original)(timed(original)))
    stack.callback(setattr, cls, name, original)


def _compiles(executor: Any) -> bool:
    return getattr(executor.vllm_config.compilation_config, "mode", None) != 0


def _compiled(executor: Any) -> float | None:
    """Seconds that torch.compile took so far; None where vLLM does not count them."""
    try:
        config = executor.vllm_config.compilation_config
        encoder = getattr(config, "encoder_compilation_time", 0.0)
        return float(config.compilation_time) + float(encoder)
    except (AttributeError, TypeError):
        return None
