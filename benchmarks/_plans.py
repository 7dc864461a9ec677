"""Which cases each stage of `gpu_check.py` has: data, for a CUDA device or for a trial on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SEVEN_B = "allenai/Molmo-7B-D-0924"
STAGES = ("verify", "decode", "overhead", "concurrency", "warm", "telemetry", "soak")
LIMITS_S: Mapping[str, float] = {
    "verify": 1500,
    "decode": 1200,
    "overhead": 900,
    "concurrency": 420,
    "warm": 900,
    "telemetry": 240,
    "soak": 420,
}
"""Seconds of each stage; what does not fit is left for the next run."""

# Language and vision attention that vLLM's CUDA platform knows for models of this kind. Those that
# cannot do a dtype, or are not installed, say so at the start and are recorded as unusable.
ATTENTION = {"bfloat16": ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"), "float32": ("TRITON_ATTN",)}
VISION = {
    "bfloat16": ("FLASH_ATTN", "TRITON_ATTN", "TORCH_SDPA", "FLASHINFER"),
    "float32": ("TRITON_ATTN", "TORCH_SDPA"),
}
CONFIGURATIONS = (
    ("bf16", "auto"),
    ("fp8", "auto"),
    ("bf16", "fp8"),
    ("bf16", "fp8_per_token_head"),
    ("fp8", "fp8"),
    ("fp8", "fp8_per_token_head"),
)


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        kind: the function of `_checks.STAGES`; the stage's own where it is empty.
    """

    stage: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""


def cases(device: str, *, gpu_bytes: int | None = None) -> list[Case]:
    """All cases for "cuda" or "cpu"; two engines at once need `gpu_bytes` for both."""
    return list(_cuda(gpu_bytes) if device == "cuda" else _cpu())


def with_backends(case: Case, attention: str | None, vision: str | None) -> Case:
    """The case with these backends wherever it leaves them to vLLM; None changes nothing."""
    wanted = {"attention_backend": attention, "mm_encoder_attn_backend": vision}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    key = "engine_args" if case.stage == "verify" else "engine"
    if not wanted or case.kind == "copy":
        return case
    return replace(case, options={**case.options, key: {**wanted, **case.options.get(key, {})}})


def _verify(name: str, **options: Any) -> Case:
    return Case("verify", name, options)


def _cuda(gpu_bytes: int | None) -> Iterator[Case]:
    for dtype, attention in ATTENTION.items():
        for language, vision in itertools.product(attention, VISION[dtype]):
            backends = {"attention_backend": language, "mm_encoder_attn_backend": vision}
            name = f"{dtype} {language} vision {vision}"
            yield _verify(name, dtype=dtype, engine_args=backends)
    # The 7B-O layout, and what stock vLLM makes of the same pictures with each way to pool.
    yield _verify("float32 7b-o", layout="7b-o", dtype="float32")
    for vision in VISION["float32"]:
        yield _verify(
            f"float32 stock vision {vision}",
            dtype="float32",
            stock=True,
            engine_args={"mm_encoder_attn_backend": vision},
        )
    for kv in ("fp8", "fp8_per_token_head"):
        yield _verify(f"bfloat16 kv {kv}", dtype="bfloat16", kv_cache_dtype=kv)
    yield _verify(
        "bfloat16 weights fp8_per_channel",
        dtype="bfloat16",
        engine_args={"precision": "fp8"},
    )
    yield Case("decode", "copy", {"device": "cuda", "bytes": 4 << 30}, "copy")
    seven = {"model": SEVEN_B, "load_format": "dummy", "max_model_len": 4096}
    for precision, kv in CONFIGURATIONS:
        engine = {**seven, "precision": precision, "kv_cache_dtype": kv, "max_num_seqs": 8}
        yield Case(
            "decode", f"{precision} kv {kv}", {"engine": engine, "tokens": 256, "runs": 5}
        )
    share = {"gpu_memory_utilization": 0.4, "kv_cache_memory_gb": 2}
    # One start of each side: what a start costs with 7B weights is better spent on pairs.
    run = {"starts": 1, "pairs": 15, "warm_up": 2, "rest_s": 0.1, "decode_tokens": 257,
           "time_limit_s": 300}  # fmt: skip
    yield Case("overhead", "stub", {"engine": {"model": "stub", **share}, "run": run})
    # Two engines of 17 GB and their caches, with room for activations.
    if gpu_bytes is None or gpu_bytes > 60e9:
        large = {**seven, "precision": "bf16", **share}
        yield Case("overhead", "7b", {"engine": large, "run": run})
    many = {**seven, "max_num_seqs": 32}
    load = {"engine": many, "users": [1, 2, 4, 8, 16, 32], "tokens": 128, "runs": 3}
    yield Case("concurrency", "1 to 32", load)
    starts = {"model": SEVEN_B, "eager": False, "repeats": 2, "engine": {"load_format": "dummy"}}
    yield Case("warm", "7b", starts)
    yield Case("telemetry", "idle and load", {"engine": seven, "seconds": 30})
    mixed = {"engine": {**seven, "max_num_seqs": 8}, "seconds": 240, "tokens": 128, "large": True}
    yield Case("soak", "mixed load", mixed)


def _cpu() -> Iterator[Case]:
    yield _verify("float32, beside stock", dtype="float32", stock=True, small=True)
    yield _verify("bfloat16 kv fp8", dtype="bfloat16", kv_cache_dtype="fp8", small=True)
    yield Case("decode", "copy", {"device": "cpu", "bytes": 1 << 28, "runs": 5}, "copy")
    small = {"model": "stub", "load_format": "dummy", "max_model_len": 2048, "max_num_seqs": 4,
             "kv_cache_memory_gb": 0.25, "enforce_eager": True}  # fmt: skip
    for precision, kv in (("bf16", "auto"), ("bf16", "fp8"), ("fp8", "auto")):
        engine = {**small, "precision": precision, "kv_cache_dtype": kv}
        yield Case("decode", f"{precision} kv {kv}", {"engine": engine, "tokens": 17, "runs": 2})
    run = {"starts": 1, "pairs": 3, "warm_up": 1, "decode_tokens": 65, "request_tokens": 9,
           "time_limit_s": 120}  # fmt: skip
    stub = {"model": "stub", "max_model_len": 2048, "kv_cache_memory_gb": 0.25}
    yield Case("overhead", "stub", {"engine": stub, "run": run})
    load = {"engine": small, "users": [1, 2, 4], "tokens": 8, "runs": 1}
    yield Case("concurrency", "1 to 4", load)
    yield Case("warm", "stub", {"model": "stub", "eager": True, "repeats": 1, "engine": {}})
    yield Case("telemetry", "idle and load", {"engine": small, "seconds": 5})
    mixed = {"engine": small, "seconds": 60, "tokens": 8, "large": False}
    yield Case("soak", "mixed load", mixed)
