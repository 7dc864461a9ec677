"""What fits a device and how fast it can be, worked out before anything is loaded.

The ceilings are a roofline: a step takes at least as long as moving its bytes through memory and
at least as long as its arithmetic at the published peak. They are limits, not predictions. A plan
refuses nothing: what does not fit is in it, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from molmo_edge.devices.history import Share, shares
from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.precision import choose_precision, planned_dtype, usable_bytes
from molmo_edge.devices.profiles import Profile, select_profile
from molmo_edge.devices.roof import FORMULAS, Roof
from molmo_edge.devices.shapes import KV_DTYPES, ModelShape, Weights, model_shape
from molmo_edge.errors import ConfigError

__all__ = ["Plan", "PrecisionPlan", "model_shape", "plan"]

_BLOCK = 16  # tokens a KV block; a request takes whole blocks


@dataclass(frozen=True)
class PrecisionPlan:
    """One precision of a plan; ``None`` where the device's figures are not known.

    Attributes:
        precision: of the dense weights.
        weights: bytes by part.
        fits: whether weights and one full-length request fit.
        kv_budget_bytes: memory left for the KV cache, within what the profile gives it.
        requests: tokens a request → KV dtype → how many requests fit.
        decode_bytes: weights read for each step.
        decode_tps: ceiling of one request's decode, tokens per second.
        decode_tps_batch: ceiling of all requests of the batch together.
        prefill_tps: ceiling of prompt tokens per second.
        limit: what binds decode at batch 1: "bandwidth" or "arithmetic".
        note: what a person should know about it.
    """

    precision: str
    weights: Weights
    fits: bool | None
    kv_budget_bytes: int | None
    requests: dict[int, dict[str, int | None]]
    decode_bytes: int
    decode_tps: float | None
    decode_tps_batch: float | None
    prefill_tps: float | None
    limit: str | None
    note: str


@dataclass(frozen=True)
class Plan:
    """What a device can do with a model.

    Attributes:
        model, device, profile: names; ``profile_reason`` says why that profile.
        chosen: the precision "auto" gives, ``None`` if nothing fits; ``chosen_reason`` says why.
        parameters: of the whole model.
        kv_bytes_per_token: KV dtype → bytes of one token in a short context.
        kv_cache_dtype: the one the ceilings are for.
        prompt_tokens, output_tokens: the request the ceilings are for; decode sees the prompt and
            half of the output.
        batch: requests together in ``decode_tps_batch``.
        usable_bytes: memory for weights and KV cache.
        bandwidth_bytes_s: published peak, ``None`` if not known.
        rows: one for each precision.
        history: earlier published measurements on this device as shares of their ceilings.
        formulas: how the figures come about.
        notes: what is missing or uncertain.
    """

    model: str
    device: str
    profile: str
    profile_reason: str
    chosen: str | None
    chosen_reason: str
    parameters: int
    kv_bytes_per_token: dict[str, int]
    kv_cache_dtype: str
    prompt_tokens: int
    output_tokens: int
    batch: int
    usable_bytes: int | None
    bandwidth_bytes_s: float | None
    rows: tuple[PrecisionPlan, ...]
    history: tuple[Share, ...]
    formulas: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = asdict(self)
        for row, source in zip(plain["rows"], self.rows, strict=True):
            row["weights"]["total"] = source.weights.total
            row["requests"] = {str(tokens): fit for tokens, fit in row["requests"].items()}
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
    """Memory and roofline of a model on a device, for every precision side by side.

    Args:
        shape: from ``model_shape``.
        device: from ``detect`` or ``known_device``.
        profile: the device's own if ``None``.
        kv_cache_dtype: the profile's if ``None``; "auto" is BF16.
        prompt_tokens, output_tokens: the request the ceilings are for; by default one picture
            and its description as in the 2025 report.
        lengths: tokens of prompt and output for which requests are counted.
        batch: requests at once, the profile's ``max_num_seqs`` if ``None``.
        bandwidth_bytes_s: instead of the device's published one, for instance a measured one.

    Raises:
        ConfigError: an unknown KV cache dtype or a count below 1. Nothing else.
    """
    for name, value in {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}.items():
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, not {value}")
    source, reason = (profile, "asked for") if profile else select_profile(device)
    kv_dtype = planned_dtype(kv_cache_dtype or str(source.settings.get("kv_cache_dtype", "auto")))
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"unknown kv_cache_dtype {kv_dtype!r}: expected {', '.join(KV_DTYPES)}")
    many = batch if batch is not None else int(source.settings.get("max_num_seqs", 8))
    if many < 1 or any(length < 1 for length in lengths):
        raise ConfigError("batch and lengths must be 1 or more")
    utilization = source.settings.get("gpu_memory_utilization")
    usable = usable_bytes(device, utilization)
    bandwidth = bandwidth_bytes_s or device.memory_bandwidth_bytes_s
    roof = Roof(shape, device, bandwidth, kv_dtype, prompt_tokens, output_tokens)
    try:
        choice = choose_precision(
            "auto", device, shape.bytes_by_precision(), profile=source, utilization=utilization
        )
        chosen, why = choice.precision, choice.reason
    except ConfigError as exc:
        chosen, why = None, str(exc)
    shown = chosen or shape.precisions[0]
    return Plan(
        model=shape.name,
        device=device.name,
        profile=source.name,
        profile_reason=reason,
        chosen=chosen,
        chosen_reason=why,
        parameters=shape.parameters,
        kv_bytes_per_token={name: shape.kv_bytes(1, name) for name in KV_DTYPES},
        kv_cache_dtype=kv_dtype,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batch=many,
        usable_bytes=usable,
        bandwidth_bytes_s=bandwidth,
        rows=tuple(
            _row(roof, precision, usable, source, tuple(lengths), many)
            for precision in shape.precisions
        ),
        history=shares(shape, device, bandwidth),
        formulas=FORMULAS + tuple(line for line in [roof.worked(shown)] if line is not None),
        notes=_notes(shape, device, bandwidth),
    )


def _row(
    roof: Roof,
    precision: str,
    usable: int | None,
    profile: Profile,
    lengths: tuple[int, ...],
    batch: int,
) -> PrecisionPlan:
    shape, weights = roof.shape, roof.shape.weights(precision)
    left = None if usable is None else usable - weights.total
    budget = None if left is None else max(0, left)
    given = profile.settings.get("kv_cache_memory_gb")
    if budget is not None and given is not None:
        budget = min(budget, int(given * (1 << 30)))
    one, limit = roof.decode(precision, 1)
    many, _ = roof.decode(precision, batch)

    def fit(tokens: int, dtype: str) -> int | None:
        blocks = -(-tokens // _BLOCK) * _BLOCK
        return None if budget is None else budget // shape.kv_bytes(blocks, dtype)

    requests = {tokens: {dtype: fit(tokens, dtype) for dtype in KV_DTYPES} for tokens in lengths}
    longest = shape.kv_bytes(max(lengths, default=1), roof.kv_dtype)
    fits = None if left is None else left >= longest
    return PrecisionPlan(
        precision=precision,
        weights=weights,
        fits=fits,
        kv_budget_bytes=budget,
        requests=requests,
        decode_bytes=shape.decode_bytes(precision),
        decode_tps=one,
        decode_tps_batch=many,
        prefill_tps=roof.prefill(precision),
        limit=limit,
        note=_row_note(shape, precision, roof.device, left, longest),
    )


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


def _notes(shape: ModelShape, device: DeviceInfo, bandwidth: float | None) -> tuple[str, ...]:
    notes = []
    if bandwidth is None:
        notes.append(
            f"the memory bandwidth of {device.name} is not in the table of published figures, so "
            "there are no ceilings; give a measured one to get them"
        )
    if device.memory_available_bytes is None:
        notes.append("free memory is not known: usable memory is a share of the nominal size")
    if device.assumed:
        notes.append(f"taken from published figures: {', '.join(device.assumed)}")
    if not shape.measured:
        notes.append("weights are worked out from the configuration, not read from files")
    if shape.head == 0:
        notes.append("the head is the embedding's own matrix, so it is counted once")
    if device.figures_source:
        notes.append(f"figures: {device.figures_source}")
    return tuple(notes)
