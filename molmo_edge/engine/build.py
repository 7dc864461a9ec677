"""From a plan to a running engine, in the thread that steps it."""

from __future__ import annotations

import difflib
import logging
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from molmo_edge.devices.caches import CACHE_VARIABLES
from molmo_edge.engine.async_engine import ProcessEngine
from molmo_edge.engine.heap import trim
from molmo_edge.engine.installed import engine_device, require_vllm, versions
from molmo_edge.engine.placement import in_process, in_thread
from molmo_edge.engine.stages import watched
from molmo_edge.engine.vllm_args import BuildPlan, engine_environment, plan_build
from molmo_edge.engine.vllm_engine import PROCESS_LOCK, VllmEngine
from molmo_edge.engine.vllm_errors import mapped
from molmo_edge.errors import ConfigError
from molmo_edge.interface import EngineInfo

__all__ = [
    "BuildPlan",
    "build",
    "engine_device",
    "engine_environment",
    "plan_build",
    "quiet",
    "require_vllm",
    "set_environment",
    "versions",
]

logger = logging.getLogger("molmo_edge")

# Variables that this module set, and to what: those it may set again for another engine.
_ours: dict[str, str] = {}


def build(plan: BuildPlan, config_s: float = 0.0) -> VllmEngine:
    """Builds the engine in the calling thread, which must be the one that steps it.

    `config_s` is what the caller has spent on settings, device and checkpoint.

    Raises ConfigError, ModelError, MissingDependencyError or EngineStartError, with vLLM's own
    exception chained.
    """
    began = time.perf_counter()
    apart = plan.settings.engine == "process"
    placement = in_process(plan.family.name) if apart else in_thread()
    with mapped("build"), PROCESS_LOCK, placement:
        from vllm import LLM

        imported = time.perf_counter()
        plan.family.prepare()
        _check_names(plan.settings.engine_args)
        with watched() as stages:
            llm = LLM(**plan.llm_args)
        built = time.perf_counter()
        model = llm.llm_engine.model_config
        info = EngineInfo(
            max_model_len=int(model.max_model_len),
            environment={**plan.environment, "max_model_len": int(model.max_model_len)},
            startup_s={
                "config": config_s,
                "imports": imported - began,
                **stages.seconds(),
                "engine": built - imported,
                "total": config_s + built - began,
            },
        )
        renderer = plan.family.renderer(llm, plan.settings.max_crops, plan.settings.resize)
        # The start leaves behind as much again as small checkpoints weigh.
        trim()
        return (ProcessEngine if apart else VllmEngine)(llm, renderer, info)


def quiet() -> None:
    """Keeps the start quiet unless the user asked for vLLM's log; before torch is imported."""
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        logging.getLogger("vllm").setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # vLLM's Triton stand-in looks at every name in torch.distributed, this one included.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.reduce_op", FutureWarning)


def set_environment(values: Mapping[str, str]) -> None:
    """Sets variables that the user has not set himself, and makes the cache folders among them.

    Before torch, CUDA and vLLM look: the CUDA driver reads its own once, when it starts. A cache
    folder that cannot be made is left to whoever would use it.
    """
    for name, value in values.items():
        if os.environ.get(name) != _ours.get(name):
            continue
        if name in CACHE_VARIABLES and not _made(Path(value)):
            continue
        os.environ[name] = _ours[name] = value


def _made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        logger.warning(
            "Compiled code is not kept for the next start: '%s' cannot be made (%s). Name a "
            "writable folder with cache_dir or MOLMO_EDGE_CACHE_DIR.",
            folder,
            reason,
        )
        return False
    return True


def _check_names(engine_args: Mapping[str, object]) -> None:
    """Raises ConfigError for a name that this vLLM does not know, with the nearest one."""
    import dataclasses
    import inspect

    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    known |= set(inspect.signature(LLM).parameters) - {"kwargs"}
    for name in engine_args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"engine_args: vLLM knows no argument {name}.{hint}")
