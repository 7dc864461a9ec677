"""Start an engine from its plan, in the thread that steps it.

docs/robustness.md lists the environment variables that this sets in the host process.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo_edge.devices.caches import CACHE_VARIABLES
from molmo_edge.engine import async_engine, vllm_engine
from molmo_edge.engine.vllm_args import BuildPlan
from molmo_edge.engine.vllm_errors import mapped
from molmo_edge.errors import ConfigError, did_you_mean
from molmo_edge.interface import Engine, EngineInfo

logger = logging.getLogger("molmo_edge")

# Variables that this module set, and their values: it may set those again for another engine.
_ours: dict[str, str] = {}


def build(plan: BuildPlan, config_s: float, abandoned: Callable[[], bool]) -> Engine:
    """Start the engine in the calling thread, which must be the one that steps it.

    Args:
        config_s: seconds the caller spent on settings, device and checkpoint.
        abandoned: whether nobody waits any longer; ends the start of a child process.

    Raises:
        ConfigError, ModelError, MissingDependencyError, EngineStartError: with vLLM's own exception
            chained.
    """
    began = time.perf_counter()
    if plan.settings.engine == "process":
        async_engine.require_main_guard()
    with mapped("build"):
        with _collection_paused():
            import vllm  # noqa: F401

            imported = time.perf_counter()
            plan.family.prepare()
            _check_names(plan.settings.engine_args)
        # In a frame of its own: a module that keeps an ImportError keeps this one for good.
        return _start(plan, config_s, abandoned, began, imported)


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Import without garbage collections, which find nothing and take a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _start(
    plan: BuildPlan, config_s: float, abandoned: Callable[[], bool], began: float, imported: float
) -> Engine:
    settings, family = plan.settings, plan.family
    engine = (
        async_engine.start(plan.llm_args, family.name, abandoned)
        if settings.engine == "process"
        else vllm_engine.start(plan.llm_args)
    )
    ended = time.perf_counter()
    config = engine.core.vllm_config
    length = int(config.model_config.max_model_len)
    engine.info = EngineInfo(
        max_model_len=length,
        environment={**plan.environment, "max_model_len": length},
        startup_s={
            "config": config_s,
            "imports": imported - began,
            "compile": _compile_s(config.compilation_config),
            "engine": ended - imported,
            "total": config_s + ended - began,
        },
    )
    try:
        engine.renderer = family.renderer(engine.core, settings.max_crops or 1, settings.resize)
    except BaseException:
        engine.close()
        raise
    # The start leaves as much garbage as small checkpoints weigh.
    vllm_engine.release_memory()
    return engine


def quiet() -> None:
    """Have vLLM and torch log errors alone; call it before either is imported."""
    set_environment({"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"})
    if "VLLM_LOGGING_LEVEL" in _ours:
        logging.getLogger("vllm").setLevel(logging.ERROR)


def set_environment(values: Mapping[str, str]) -> None:
    """Set variables that the user has not set, and make the cache directories among them.

    Call it before torch, CUDA and vLLM read them: the CUDA driver does so once, when it starts. A
    directory that cannot be made is left to the library that would use it.
    """
    for name, value in values.items():
        if os.environ.get(name) != _ours.get(name):
            continue
        try:
            if name in CACHE_VARIABLES:
                Path(value).mkdir(parents=True, exist_ok=True)
                if not os.access(value, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "it belongs to another user")
            os.environ[name] = _ours[name] = value
        except OSError as exc:
            logger.warning(
                "Compiled code is not kept for the next start: '%s' cannot be made (%s). Name a "
                "writable directory with cache_dir or MOLMO_EDGE_CACHE_DIR.",
                value,
                exc.strerror,
            )


def _compile_s(config: Any) -> float | None:
    """Return seconds of torch.compile; 0 without it, None where vLLM does not count them."""
    return float(config.compilation_time) if config.compilation_time or config.mode == 0 else None


def _check_names(engine_args: Mapping[str, object]) -> None:
    """Raise ConfigError for a name that this vLLM does not know, with the nearest one."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    known |= set(inspect.signature(LLM).parameters) - {"kwargs"}
    for name in engine_args:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"engine_args: vLLM has no argument {name}.{hint}")
