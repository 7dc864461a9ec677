"""Compute what fits a device and how fast it can be, before anything is loaded.

The ceilings are a roofline, limits and not predictions: a step takes at least bytes ÷ bandwidth and
at least FLOP ÷ published peak. A decode step reads the blocks, the head and the KV cache of each
request; its FLOP are 2 per matrix parameter, attention over the context, and the head. Prefill
reads the blocks once; each token's attention sees half the prompt. A plan refuses nothing: what
does not fit is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.precision import choose_precision, usable_bytes
from molmo_edge.devices.profiles import Profile, select_profile
from molmo_edge.devices.shapes import KV_DTYPES, ModelShape, Weights
from molmo_edge.errors import ConfigError

_BLOCK = 16  # tokens per KV block; a request takes whole blocks
_KV_SIZES = ("bfloat16", "fp8", "fp8_per_token_head")  # other dtypes have the size of one of them


@dataclass(frozen=True)
class PrecisionPlan:
    """One precision of a plan; ``None`` where the device's figures are not known."""

    precision: str  # of the dense weights
    weights: Weights  # bytes by part
    fits: bool | None  # whether weights and one full-length request fit
    kv_budget_bytes: int | None  # memory left for the KV cache, within the profile's limit
    requests: dict[int, dict[str, int | None]]  # that fit, by tokens per request and KV dtype
    decode_bytes: int  # weights read in each step
    # Ceilings in tokens per second: one request, all of the batch together, prompt tokens.
    decode_tps: float | None
    decode_tps_batch: float | None
    prefill_tps: float | None
    limit: str | None  # of decode at batch 1: "bandwidth" or "arithmetic"
    note: str  # caveats, empty if there are none


@dataclass(frozen=True)
class Plan:
    """What a device can do with a model."""

    model: str
    device: str
    profile: str
    profile_reason: str
    chosen: str | None  # the precision "auto" gives, None if nothing fits
    chosen_reason: str
    parameters: int
    kv_bytes_per_token: dict[str, int]  # of one token in a short context, by KV dtype
    kv_cache_dtype: str  # of the ceilings
    prompt_tokens: int  # decode attends to the prompt and half of the output
    output_tokens: int
    batch: int  # concurrent requests in decode_tps_batch
    usable_bytes: int | None  # memory for weights and KV cache
    bandwidth_bytes_s: float | None
    rows: tuple[PrecisionPlan, ...]
    notes: tuple[str, ...]  # what is missing or uncertain

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        plain = asdict(self)
        for row, source in zip(plain["rows"], self.rows, strict=True):
            row["weights"]["total"] = source.weights.total
        return plain


def plan(
    shape: ModelShape,
    device: DeviceInfo,
    *,
    profile: Profile | None = None,
    kv_cache_dtype: str | None = None,
    prompt_tokens: int = 1210,
    output_tokens: int = 190,
    lengths: Sequence[int] = (1536, 4096),
    batch: int | None = None,
    bandwidth_bytes_s: float | None = None,
) -> Plan:
    """Compute memory and roofline of a model on a device for every precision.

    Args:
        shape: from ``model_shape``.
        device: from ``detect`` or ``known_device``.
        profile: the device's own if ``None``.
        kv_cache_dtype: the profile's if ``None``; "auto" is BF16.
        prompt_tokens, output_tokens: of a request; by default one image and its description.
        lengths: tokens of prompt and output for which requests are counted.
        batch: concurrent requests, the profile's ``max_num_seqs`` if ``None``.
        bandwidth_bytes_s: replaces the published bandwidth, for instance with a measured one.

    Raises:
        ConfigError: an unknown KV cache dtype or a count below 1.
    """
    profile, reason = (profile, "requested") if profile else select_profile(device)
    settings = profile.settings
    if bandwidth_bytes_s is not None:
        device = replace(device, memory_bandwidth_bytes_s=bandwidth_bytes_s)
    kv_dtype = kv_cache_dtype or str(settings.get("kv_cache_dtype", "auto"))
    kv_dtype = "bfloat16" if kv_dtype == "auto" else kv_dtype
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"unknown kv_cache_dtype {kv_dtype!r}: expected {', '.join(KV_DTYPES)}")
    batch = int(settings["max_num_seqs"]) if batch is None else batch
    if min(prompt_tokens, output_tokens, batch, *lengths) < 1:
        raise ConfigError("prompt_tokens, output_tokens, batch and lengths must be 1 or more")
    utilization = settings.get("gpu_memory_utilization")
    usable = usable_bytes(device, utilization)
    chosen: str | None
    try:
        choice = choose_precision(
            "auto", device, shape.bytes_by_precision(), profile=profile, utilization=utilization
        )
        chosen, why = choice.precision, choice.reason
    except ConfigError as exc:
        chosen, why = None, str(exc)
    context = prompt_tokens + output_tokens // 2
    rows = []
    for precision in shape.precisions:
        weights = shape.weights(precision)
        left = None if usable is None else usable - weights.total
        longest = shape.kv_bytes(max(lengths), kv_dtype)
        budget = None if left is None else max(0, left)
        if budget is not None and "kv_cache_memory_gb" in settings:
            budget = min(budget, int(settings["kv_cache_memory_gb"] * (1 << 30)))
        decode_tps, limit = _decode(shape, device, precision, context, kv_dtype, 1)
        decode_tps_batch, _ = _decode(shape, device, precision, context, kv_dtype, batch)
        rows.append(
            PrecisionPlan(
                precision=precision,
                weights=weights,
                fits=None if left is None else left >= longest,
                kv_budget_bytes=budget,
                requests={tokens: _requests(shape, budget, tokens) for tokens in lengths},
                decode_bytes=shape.decode_bytes(precision),
                decode_tps=decode_tps,
                decode_tps_batch=decode_tps_batch,
                prefill_tps=_prefill(shape, device, precision, prompt_tokens),
                limit=limit,
                note=_row_note(shape, precision, device, left, longest),
            )
        )
    return Plan(
        model=shape.name,
        device=device.name,
        profile=profile.name,
        profile_reason=reason,
        chosen=chosen,
        chosen_reason=why,
        parameters=shape.parameters,
        kv_bytes_per_token={name: shape.kv_bytes(1, name) for name in _KV_SIZES},
        kv_cache_dtype=kv_dtype,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batch=batch,
        usable_bytes=usable,
        bandwidth_bytes_s=device.memory_bandwidth_bytes_s,
        rows=tuple(rows),
        notes=_notes(shape, device),
    )


def _requests(shape: ModelShape, budget: int | None, tokens: int) -> dict[str, int | None]:
    """Requests of that many tokens that a KV cache of ``budget`` bytes holds, by KV dtype."""
    blocks = -(-tokens // _BLOCK) * _BLOCK
    return {
        dtype: None if budget is None else budget // shape.kv_bytes(blocks, dtype)
        for dtype in _KV_SIZES
    }


def _peak(device: DeviceInfo, precision: str) -> float | None:
    """Published FLOP/s of the arithmetic that a precision is computed in."""
    capability = device.capability
    if precision == "nvfp4" and (capability is None or capability >= (10, 0)):
        return device.fp4_flops
    if precision == "fp8" and (capability is None or capability >= (8, 9)):
        return device.fp8_flops
    return device.bf16_flops  # weight-only: unpacked to BF16 before the multiplication


def _decode(
    shape: ModelShape, device: DeviceInfo, precision: str, context: int, kv_dtype: str, batch: int
) -> tuple[float | None, str | None]:
    """Ceiling of all requests together in tokens per second, and what limits it."""
    bandwidth = device.memory_bandwidth_bytes_s
    if bandwidth is None:
        return None, None
    kv = shape.kv_bytes(context, kv_dtype)
    transfer = (shape.decode_bytes(precision) + batch * kv) / bandwidth
    peak, work = _peak(device, precision), 0.0
    if peak is not None:
        head = 2.0 * (shape.head or shape.embedding)
        work = batch * (shape.flops_per_token(context) + head) / peak
    return batch / max(transfer, work), "bandwidth" if transfer >= work else "arithmetic"


def _prefill(shape: ModelShape, device: DeviceInfo, precision: str, prompt: int) -> float | None:
    """Ceiling in prompt tokens per second."""
    peak, bandwidth = _peak(device, precision), device.memory_bandwidth_bytes_s
    if peak is None:
        return None
    seconds = prompt * shape.flops_per_token(prompt // 2) / peak
    if bandwidth is not None:
        seconds = max(seconds, shape.weights(precision).blocks / bandwidth)
    return prompt / seconds


def _row_note(
    shape: ModelShape, precision: str, device: DeviceInfo, left: int | None, longest: int
) -> str:
    notes = []
    if left is not None and left < 0:
        notes.append(f"weights are {-left / 1e9:.1f} GB too large")
    elif left is not None and left < longest:
        notes.append("weights fit, a full-length request beside them does not")
    if shape.stored is None and precision in ("w4a16", "nvfp4"):
        notes.append("needs a checkpoint quantised beforehand")
    if precision == "fp8" and device.kind == "cpu":
        notes.append("emulated on CPUs, slower than BF16")
    capability = device.capability
    if precision == "fp8" and capability is not None and capability < (8, 9):
        notes.append("weights only, computed in BF16")
    if precision == "nvfp4" and capability is not None and capability < (10, 0):
        notes.append("no FP4 arithmetic on this GPU")
    return "; ".join(notes)


def _notes(shape: ModelShape, device: DeviceInfo) -> tuple[str, ...]:
    notes = []
    if device.memory_bandwidth_bytes_s is None:
        notes.append(
            f"the memory bandwidth of {device.name} is not in the table of published figures, so "
            "there are no ceilings"
        )
    if device.memory_available_bytes is None:
        notes.append("free memory is not known: usable memory is a fraction of the nominal size")
    if not shape.measured:
        notes.append("weights are computed from the configuration, not read from files")
    if shape.head == 0:
        notes.append("the head is the embedding's own matrix, so it is counted once")
    if device.figures_source:
        notes.append(f"figures: {device.figures_source}")
    return tuple(notes)
