"""Which KV cache dtype a device and a backend can have, and when it may cost quality."""

from __future__ import annotations

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.shapes import ModelShape
from molmo_edge.errors import ConfigError


def check_kv_cache_dtype(
    kv_cache_dtype: str, device: DeviceInfo, attention_backend: str | None = None
) -> None:
    """Refuses a KV cache dtype that vLLM 0.32 cannot have on this device or backend.

    Raises:
        ConfigError: with what to use instead. What is unknown about the device is let through.
    """
    capability, backend = device.capability, (attention_backend or "").upper()
    if kv_cache_dtype in ("auto", "bfloat16"):
        return
    if device.kind == "cpu":
        if kv_cache_dtype.endswith("per_token_head"):
            raise ConfigError(f"kv_cache_dtype {kv_cache_dtype} needs a GPU; use fp8 or auto")
        if device.cpu_isa and "avx512f" not in device.cpu_isa:
            raise ConfigError("kv_cache_dtype fp8 needs AVX-512 on a CPU; use auto")
        return
    if kv_cache_dtype.startswith("fp8") and capability is not None and capability < (8, 9):
        raise ConfigError(
            f"kv_cache_dtype {kv_cache_dtype} needs compute capability 8.9 or newer, "
            f"{device.name} has {device.compute_capability}; use auto, or int8_per_token_head"
        )
    if kv_cache_dtype.endswith("per_token_head") and backend not in ("", "TRITON_ATTN"):
        raise ConfigError(
            f"kv_cache_dtype {kv_cache_dtype} works with attention_backend TRITON_ATTN only, "
            f"not {backend}"
        )
    if (
        kv_cache_dtype == "fp8"
        and backend == "FLASH_ATTN"
        and capability is not None
        and capability[0] not in (9, 10)
    ):
        raise ConfigError(
            f"FLASH_ATTN has no FP8 KV cache on {device.sm}; use attention_backend TRITON_ATTN"
        )


def kv_cache_warning(kv_cache_dtype: str, *, qwen2: bool) -> str | None:
    """One line when the plain FP8 cache may cost quality, else ``None``.

    Args:
        kv_cache_dtype: as set.
        qwen2: whether the decoder is of the Qwen2 class (``ModelShape.qwen2``).
    """
    if kv_cache_dtype not in ("fp8", "fp8_e4m3") or not qwen2:
        return None
    return (
        f"kv_cache_dtype {kv_cache_dtype} uses a scale of 1.0, and Qwen2-class models such as "
        "Molmo-7B-D have large key outliers: measure it with the benchmark's drift check, or use "
        "fp8_per_token_head"
    )


def planned_dtype(kv_cache_dtype: str) -> str:
    """The name in ``KV_DTYPES`` whose bytes a setting stands for; "auto" is BF16."""
    return {"auto": "bfloat16", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8"}.get(
        kv_cache_dtype, kv_cache_dtype
    )


def request_bytes(
    shape: ModelShape, tokens: int, kv_cache_dtype: str, *, float32: bool = False
) -> int:
    """Bytes of the KV cache of one request; with ``float32`` activations "auto" is float32 too."""
    size = shape.kv_bytes(tokens, planned_dtype(kv_cache_dtype))
    return 2 * size if float32 and kv_cache_dtype == "auto" else size


def check_kv_room(longest: int, given: int | None) -> None:
    """Refuses a KV cache of ``given`` bytes that cannot hold one request of ``longest`` bytes.

    Raises:
        ConfigError: vLLM would refuse it too, after loading the model.
    """
    if given is not None and longest > given:
        raise ConfigError(
            f"kv_cache_memory_gb {given / 2**30:g} is too small: one request of max_model_len "
            f"needs {longest / 2**30:.3g} GiB; raise it, or lower max_model_len"
        )
