"""Choose the precision of the weights and check the KV cache, before anything is loaded.

A load that runs out of memory after minutes, or one that silently leaves the weights unquantised,
is what these rules prevent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from molmo_edge.devices.detect import DeviceInfo
from molmo_edge.devices.profiles import Profile
from molmo_edge.devices.specs import GIB
from molmo_edge.errors import ConfigError

# Beside weights and cache, for the CUDA context, graphs, and activations of a few thousand tokens.
_WORKSPACE_BYTES = GIB
# Of shared or main memory, left to other programs where free memory is not known.
_SYSTEM_FRACTION = 0.15
DEFAULT_UTILIZATION = 0.9  # vLLM's own gpu_memory_utilization


@dataclass(frozen=True)
class Choice:
    """A precision and the reason for it."""

    precision: str  # "bf16", "fp8", "w4a16", "nvfp4", or what a quantised checkpoint holds
    reason: str  # one line
    fallback: bool = False  # the preferred one did not fit, so the reason should be shown


def usable_bytes(
    device: DeviceInfo, utilization: float | None = None, activations: int = 0
) -> int | None:
    """Return the memory for weights and KV cache in bytes, without workspace and ``activations``.

    A discrete GPU gives ``utilization`` (default 0.9) of its memory, and no more than is free;
    shared or main memory gives what is free. ``None`` if the device's memory is not known.
    """
    total, free = device.memory_total_bytes, device.memory_available_bytes
    if total is None:
        return None
    if device.kind == "cuda" and not device.integrated:
        limit = int(total * (DEFAULT_UTILIZATION if utilization is None else utilization))
    else:
        limit = int(total * (1 - _SYSTEM_FRACTION)) if free is None else free
    return max(0, (limit if free is None else min(limit, free)) - _WORKSPACE_BYTES - activations)


def choose_precision(
    requested: str,
    device: DeviceInfo,
    model_bytes_by_precision: Mapping[str, int],
    *,
    profile: Profile,
    kv_bytes: int = 0,
    activations: int = 0,
    utilization: float | None = None,
    plain: str = "BF16",
) -> Choice:
    """Choose the precision to load a model in.

    Args:
        requested: a name of ``settings.PRECISIONS``.
        model_bytes_by_precision: ``ModelShape.bytes_by_precision()``.
        profile: its ``precision`` is what "auto" prefers.
        kv_bytes, activations: that must fit beside the weights.
        utilization: usable fraction of a discrete GPU's memory.
        plain: what messages call weights that are not quantised.

    Raises:
        ConfigError: a precision this checkpoint does not have, one that would leave dense weights
            unquantised, or weights that do not fit. "auto" fails only when nothing fits.
    """
    sizes = model_bytes_by_precision
    usable = usable_bytes(device, utilization, activations)
    room = [n for n, size in sizes.items() if usable is None or size + kv_bytes <= usable]
    precision, reason = _preferred(requested, sizes, profile)
    if precision in room:
        return Choice(precision, reason)
    size, memory = _gb(sizes[precision]), f"{_gb(usable or 0)} of usable memory on {device.name}"
    if requested == "auto" and precision == "bf16" and device.kind == "cuda" and "fp8" in room:
        smaller = f"loading them in FP8 ({_gb(sizes['fp8'])})"
        return Choice("fp8", f"{plain} weights ({size}) do not fit {memory}: {smaller}", True)
    advice = "use a checkpoint quantised to w4a16, or free memory"
    if room and device.kind == "cuda":  # CPUs emulate FP8: where it fits, it is no advice
        advice = f"precision {' or '.join(room)} fits"
    label = plain if precision == "bf16" else precision.upper()
    cache = f" and {_gb(kv_bytes)} of KV cache" if kv_bytes else ""
    raise ConfigError(f"{label} weights ({size}){cache} do not fit {memory}; {advice}")


def _preferred(requested: str, sizes: Mapping[str, int], profile: Profile) -> tuple[str, str]:
    """Return the precision to load if it fits, and why."""
    if "bf16" not in sizes:  # quantised
        (stored,) = sizes
        if stored == "bitsandbytes":
            raise ConfigError(
                "vLLM 0.32 no longer loads bitsandbytes checkpoints; use the unquantised one with "
                "precision fp8, or one quantised to w4a16"
            )
        if requested not in ("auto", stored):
            raise ConfigError(
                f"precision {requested} was requested, but the checkpoint is quantised to "
                f"{stored}; use precision auto, or the unquantised checkpoint"
            )
        return stored, "as stored"
    if requested == "auto":
        wish = str(profile.settings.get("precision"))
        return wish if wish in sizes else "bf16", f"profile {profile.name}"
    if requested not in sizes:
        raise ConfigError(
            f"precision {requested} needs a checkpoint that is already quantised, and this one "
            f"is not: molmo-edge quantize MODEL OUT --scheme {requested}"
        )
    return requested, "requested"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def check_kv_cache_dtype(
    kv_cache_dtype: str, device: DeviceInfo, attention_backend: str | None = None
) -> None:
    """Raise ConfigError if vLLM 0.32 does not support a KV cache dtype on this device or backend.

    What is not known about the device is not checked.
    """
    capability, backend = device.capability, (attention_backend or "").upper()
    per_head = kv_cache_dtype.endswith("per_token_head")
    if kv_cache_dtype in ("auto", "bfloat16"):
        return
    if device.kind == "cpu":
        if per_head:
            raise ConfigError(f"kv_cache_dtype {kv_cache_dtype} needs a GPU; use fp8 or auto")
        if device.cpu_isa and "avx512f" not in device.cpu_isa:
            raise ConfigError("kv_cache_dtype fp8 needs AVX-512 on a CPU; use auto")
        return
    if kv_cache_dtype.startswith("fp8") and capability is not None and capability < (8, 9):
        raise ConfigError(
            f"kv_cache_dtype {kv_cache_dtype} needs compute capability 8.9 or newer, "
            f"{device.name} has {device.compute_capability}; use auto, or int8_per_token_head"
        )
    if per_head and backend not in ("", "TRITON_ATTN"):
        raise ConfigError(
            f"kv_cache_dtype {kv_cache_dtype} works with attention_backend TRITON_ATTN only, "
            f"not {backend}"
        )
    data_centre = capability is None or capability[0] in (9, 10)
    if kv_cache_dtype == "fp8" and backend == "FLASH_ATTN" and not data_centre:
        raise ConfigError(
            f"FLASH_ATTN has no FP8 KV cache on {device.sm}; use attention_backend TRITON_ATTN"
        )


def kv_cache_warning(kv_cache_dtype: str, *, qwen2: bool) -> str | None:
    """Return a warning if the plain FP8 cache may cost quality; ``qwen2`` is `ModelShape`'s."""
    if kv_cache_dtype not in ("fp8", "fp8_e4m3") or not qwen2:
        return None
    return (
        f"kv_cache_dtype {kv_cache_dtype} uses a scale of 1.0, and Qwen2-class models such as "
        "Molmo-7B-D have large key outliers: measure it with the benchmark's drift check, or use "
        "fp8_per_token_head"
    )


def check_kv_room(longest: int, given: int | None) -> None:
    """Raise ConfigError if ``given`` bytes of KV cache cannot hold a request of ``longest`` bytes.

    vLLM would refuse it too, after loading the model.
    """
    if given is not None and longest > given:
        raise ConfigError(
            f"kv_cache_memory_gb {given / GIB:g} is too small: one request of max_model_len "
            f"needs {longest / GIB:.3g} GiB; raise it, or lower max_model_len"
        )
