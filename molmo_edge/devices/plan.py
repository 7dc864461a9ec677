"""Compute what fits a device and how fast it can be, before anything is loaded.

The ceilings are a roofline: a step takes at least as long as moving its bytes through memory, and
at least as long as its arithmetic at the published peak. They are limits, not predictions. A plan
refuses nothing: what does not fit is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.precision import choose_precision, planned_dtype, usable_bytes
from molmo_edge.devices.profiles import Profile, select_profile
from molmo_edge.devices.shapes import KV_DTYPES, ModelShape, Weights
from molmo_edge.errors import ConfigError

_BLOCK = 16  # tokens per KV block; a request takes whole blocks

FORMULAS = (
    "step time ≥ max(bytes ÷ bandwidth, FLOP ÷ peak)",
    "decode: bytes = blocks + head + batch · KV of the context; FLOP = batch · (2 · matrices + "
    "attention + head)",
    "prefill: bytes = blocks; FLOP = prompt · (2 · matrices + attention over half the prompt)",
    "requests = KV memory ÷ KV of one request in whole blocks of 16 tokens; KV memory = usable "
    "memory less weights, or what the profile sets if that is less",
)


# Figures of the 2025-12-08 report, Molmo-7B-D served over HTTP by vLLM 0.6.3.post1: device, label,
# output tokens over the time of the whole request (HTTP and prefill included), precision.
_REPORT = (
    ("thor", "2025 report, best run, BF16 weights", 14.0, "bf16"),
    ("thor", "2025 report, mean of 30 runs, BF16 weights", 11.1, "bf16"),
    ("rtx5080", "2025 report, mean, 4-bit bitsandbytes weights", 103.8, "nf4"),
)
_REPORT_TOKENS = 1210 + 185 // 2  # its requests: about 1,210 prompt and 69 to 300 output tokens


@dataclass(frozen=True)
class Measurement:
    """A published speed, the decode ceiling of the same weights, and their ratio ``share``."""

    label: str
    tps: float
    ceiling_tps: float
    share: float


@dataclass(frozen=True)
class PrecisionPlan:
    """One precision of a plan; ``None`` where the device's figures are not known.

    Attributes:
        precision: of the dense weights.
        weights: bytes by part.
        fits: whether weights and one full-length request fit.
        kv_budget_bytes: memory left for the KV cache, within the profile's limit.
        requests: tokens per request → KV dtype → number of requests that fit.
        decode_bytes: weights read in each step.
        decode_tps: ceiling of one request's decode, tokens per second.
        decode_tps_batch: ceiling of all requests of the batch together.
        prefill_tps: ceiling of prompt tokens per second.
        limit: what limits decode at batch 1: "bandwidth" or "arithmetic".
        note: caveats, empty if there are none.
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
        model, device, profile: names; ``profile_reason`` is why that profile applies.
        chosen: the precision "auto" gives, ``None`` if nothing fits; ``chosen_reason`` says why.
        parameters: of the whole model.
        kv_bytes_per_token: KV dtype → bytes of one token in a short context.
        kv_cache_dtype: the KV dtype of the ceilings.
        prompt_tokens, output_tokens: the request of the ceilings; decode attends to the prompt
            and half of the output.
        batch: concurrent requests in ``decode_tps_batch``.
        usable_bytes: memory for weights and KV cache.
        bandwidth_bytes_s: published peak, ``None`` if not known.
        rows: one per precision.
        history: published measurements on this device and their ceilings.
        formulas: how the figures are computed.
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
    history: tuple[Measurement, ...]
    formulas: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        plain = asdict(self)
        for row, source in zip(plain["rows"], self.rows, strict=True):
            row["weights"]["total"] = source.weights.total
            row["requests"] = {str(tokens): fit for tokens, fit in row["requests"].items()}
        return plain


@dataclass(frozen=True)
class Roofline:
    """Speed limits of one model on one device for one kind of request.

    ``kv_dtype`` is a key of ``KV_DTYPES``; ``prompt`` and ``output`` are tokens.
    """

    shape: ModelShape
    device: DeviceInfo
    bandwidth: float | None
    kv_dtype: str
    prompt: int
    output: int

    @property
    def context(self) -> int:
        """Average context of a decode step in tokens: the prompt and half of the output."""
        return self.prompt + self.output // 2

    @property
    def kv_bytes(self) -> int:
        return self.shape.kv_bytes(self.context, self.kv_dtype)

    def peak(self, precision: str) -> float | None:
        """Return the published FLOP/s of the arithmetic that a precision is computed in."""
        device = self.device
        capability = device.capability
        if precision == "nvfp4" and (capability is None or capability >= (10, 0)):
            return device.fp4_flops
        if precision == "fp8" and (capability is None or capability >= (8, 9)):
            return device.fp8_flops
        return device.bf16_flops  # weight-only: unpacked to BF16 before the multiplication

    def decode(self, precision: str, batch: int) -> tuple[float | None, str | None]:
        """Return the ceiling of all requests together in tokens per second, and what limits it."""
        if self.bandwidth is None:
            return None, None
        context, kv = self.context, self.kv_bytes
        transfer = (self.shape.decode_bytes(precision) + batch * kv) / self.bandwidth
        head = 2.0 * (self.shape.head or self.shape.embedding)
        peak = self.peak(precision)
        work = 0.0
        if peak is not None:
            work = batch * (self.shape.flops_per_token(context) + head) / peak
        return batch / max(transfer, work), "bandwidth" if transfer >= work else "arithmetic"

    def prefill(self, precision: str) -> float | None:
        """Return the ceiling in prompt tokens per second."""
        peak = self.peak(precision)
        if peak is None:
            return None
        seconds = self.prompt * self.shape.flops_per_token(self.prompt // 2) / peak
        if self.bandwidth is not None:
            seconds = max(seconds, self.shape.weights(precision).blocks / self.bandwidth)
        return self.prompt / seconds

    def example(self, precision: str) -> str | None:
        """Return the decode ceiling of one request with its numbers, if bandwidth limits it."""
        tps, limit = self.decode(precision, 1)
        if tps is None or self.bandwidth is None or limit != "bandwidth":
            return None
        return (
            f"decode, {precision}: {self.bandwidth / 1e9:g} GB/s ÷ "
            f"({self.shape.decode_bytes(precision) / 1e9:.3f} GB of weights + "
            f"{self.kv_bytes / 1e9:.3f} GB of KV at {self.context} tokens) = {tps:.1f} tok/s"
        )


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
        prompt_tokens, output_tokens: the request of the ceilings; by default one image and its
            description as in the 2025 report.
        lengths: tokens of prompt and output for which requests are counted.
        batch: concurrent requests, the profile's ``max_num_seqs`` if ``None``.
        bandwidth_bytes_s: replaces the published bandwidth, for instance with a measured one.

    Raises:
        ConfigError: an unknown KV cache dtype or a count below 1.
    """
    for name, value in {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}.items():
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, not {value}")
    source, reason = (profile, "requested") if profile else select_profile(device)
    kv_dtype = planned_dtype(kv_cache_dtype or str(source.settings.get("kv_cache_dtype", "auto")))
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"unknown kv_cache_dtype {kv_dtype!r}: expected {', '.join(KV_DTYPES)}")
    batch = int(source.settings.get("max_num_seqs", 8)) if batch is None else batch
    if batch < 1 or any(length < 1 for length in lengths):
        raise ConfigError("batch and lengths must be 1 or more")
    utilization = source.settings.get("gpu_memory_utilization")
    usable = usable_bytes(device, utilization)
    bandwidth = bandwidth_bytes_s or device.memory_bandwidth_bytes_s
    roofline = Roofline(shape, device, bandwidth, kv_dtype, prompt_tokens, output_tokens)
    try:
        choice = choose_precision(
            "auto", device, shape.bytes_by_precision(), profile=source, utilization=utilization
        )
        chosen, why = choice.precision, choice.reason
    except ConfigError as exc:
        chosen, why = None, str(exc)
    example = roofline.example(chosen or shape.precisions[0])
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
        batch=batch,
        usable_bytes=usable,
        bandwidth_bytes_s=bandwidth,
        rows=tuple(
            _row(roofline, precision, usable, source, tuple(lengths), batch)
            for precision in shape.precisions
        ),
        history=_history(shape, device, bandwidth),
        formulas=FORMULAS if example is None else (*FORMULAS, example),
        notes=_notes(shape, device, bandwidth),
    )


def _row(
    roofline: Roofline,
    precision: str,
    usable: int | None,
    profile: Profile,
    lengths: tuple[int, ...],
    batch: int,
) -> PrecisionPlan:
    shape, weights = roofline.shape, roofline.shape.weights(precision)
    left = None if usable is None else usable - weights.total
    budget = None if left is None else max(0, left)
    given = profile.settings.get("kv_cache_memory_gb")
    if budget is not None and given is not None:
        budget = min(budget, int(given * (1 << 30)))
    single, limit = roofline.decode(precision, 1)

    def fit(tokens: int, dtype: str) -> int | None:
        blocks = -(-tokens // _BLOCK) * _BLOCK
        return None if budget is None else budget // shape.kv_bytes(blocks, dtype)

    requests = {tokens: {dtype: fit(tokens, dtype) for dtype in KV_DTYPES} for tokens in lengths}
    longest = shape.kv_bytes(max(lengths, default=1), roofline.kv_dtype)
    fits = None if left is None else left >= longest
    return PrecisionPlan(
        precision=precision,
        weights=weights,
        fits=fits,
        kv_budget_bytes=budget,
        requests=requests,
        decode_bytes=shape.decode_bytes(precision),
        decode_tps=single,
        decode_tps_batch=roofline.decode(precision, batch)[0],
        prefill_tps=roofline.prefill(precision),
        limit=limit,
        note=_row_note(shape, precision, roofline.device, left, longest),
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
        notes.append("free memory is not known: usable memory is a fraction of the nominal size")
    if device.assumed:
        notes.append(f"taken from published figures: {', '.join(device.assumed)}")
    if not shape.measured:
        notes.append("weights are computed from the configuration, not read from files")
    if shape.head == 0:
        notes.append("the head is the embedding's own matrix, so it is counted once")
    if device.figures_source:
        notes.append(f"figures: {device.figures_source}")
    return tuple(notes)


def _history(
    shape: ModelShape, device: DeviceInfo, bandwidth_bytes_s: float | None
) -> tuple[Measurement, ...]:
    """Return the report's figures for this device and model; empty for others."""
    same = shape.family == "molmo" and (shape.layers, shape.heads, shape.kv_heads) == (28, 28, 4)
    if not same or shape.stored is not None or bandwidth_bytes_s is None:
        return ()
    history = []
    for name, label, tps, precision in _REPORT:
        if name == device.known_as:
            step = shape.decode_bytes(precision) + shape.kv_bytes(_REPORT_TOKENS, "fp8")
            ceiling = bandwidth_bytes_s / step
            history.append(Measurement(label, tps, ceiling, tps / ceiling))
    return tuple(history)
