"""Compute what fits a device and how fast it can be, before anything is loaded.

The ceilings are limits, not predictions: a decode step reads the blocks, the head and the KV cache
of each request, which takes at least bytes ÷ memory bandwidth. A plan refuses nothing: what does
not fit is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from molmo_edge.devices.detect import DeviceInfo
from molmo_edge.devices.precision import choose_precision, usable_bytes
from molmo_edge.devices.profiles import Profile, select_profile
from molmo_edge.devices.shapes import KV_DTYPES, SHORTEST, ModelShape, frames_within
from molmo_edge.devices.specs import GIB
from molmo_edge.errors import ConfigError

_BLOCK = 16  # tokens per KV block; a request takes whole blocks
_MOLMO2_IMAGES = {"640x480": 752, "1920x1080": 1189}  # tokens, with the checkpoints' own 8 crops
_MOLMO2_FRAMES = 384  # of a video, at most: as the checkpoints were made
_MOLMO2_FPS = 2.0


@dataclass(frozen=True)
class PrecisionPlan:
    """One precision of a plan; ``None`` where the device's figures are not known."""

    precision: str  # of the dense weights
    weight_bytes: int
    fits: bool | None  # whether weights and one request of max_model_len fit
    max_model_len: int  # of the profile, lowered to the checkpoint's own and to what fits
    requests: int | None  # that fit beside the weights, within the profile's KV cache
    decode_bytes: int  # weights read in each step
    # Ceilings in output tokens per second: of one request, of all of the batch together.
    decode_tps: float | None
    decode_tps_batch: float | None
    note: str  # caveats, empty if there are none


@dataclass(frozen=True)
class VisualPlan:
    """Images and video of a Molmo 2, and what they take for a moment beside weights and cache."""

    max_model_len: int  # at the chosen precision
    image_tokens: Mapping[str, int]  # by size in pixels
    frames: int  # of a video that fits
    seconds: float  # of a video of which the model sees 2 frames per second
    # Upper bounds for a prompt of max_model_len.
    encode_bytes: int
    prefill_bytes: int


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
    kv_cache_dtype: str
    kv_bytes_per_token: int  # in a short context
    prompt_tokens: int  # decode attends to the prompt and half of the output
    output_tokens: int
    batch: int  # concurrent requests in decode_tps_batch
    head: str  # precision of the LM head, "none" for BF16
    usable_bytes: int | None  # memory for weights and KV cache
    bandwidth_bytes_s: float | None
    rows: tuple[PrecisionPlan, ...]
    visuals: VisualPlan | None  # of a Molmo 2
    notes: tuple[str, ...]  # what is missing or uncertain

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def plan(
    shape: ModelShape,
    device: DeviceInfo,
    *,
    profile: Profile | None = None,
    settings: Mapping[str, Any] | None = None,
    kv_cache_dtype: str | None = None,
    prompt_tokens: int = 1210,
    output_tokens: int = 190,
    batch: int | None = None,
    bandwidth_bytes_s: float | None = None,
) -> Plan:
    """Compute memory and decode ceilings of a model on a device for every precision.

    Args:
        profile: the device's own if ``None``.
        settings: of the engine by name; the profile's if ``None``.
        kv_cache_dtype: that of the settings if ``None``; "auto" is BF16.
        prompt_tokens, output_tokens: of a request; by default one image and its description.
        batch: concurrent requests, ``max_num_seqs`` if ``None``.
        bandwidth_bytes_s: replaces the published bandwidth, for instance with a measured one.

    Raises:
        ConfigError: an unknown KV cache dtype or a count below 1.
    """
    fitting, reason = select_profile(device)
    if profile is None:
        profile = fitting
    elif profile.name != fitting.name:
        reason = f"{profile.name}, as requested"
    settings = profile.settings if settings is None else settings
    kv_dtype = kv_cache_dtype or str(settings.get("kv_cache_dtype", "auto"))
    kv_dtype = "bfloat16" if kv_dtype == "auto" else kv_dtype
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"unknown kv_cache_dtype {kv_dtype!r}: expected {', '.join(KV_DTYPES)}")
    batch = int(settings["max_num_seqs"]) if batch is None else batch
    if min(prompt_tokens, output_tokens, batch) < 1:
        raise ConfigError("prompt_tokens, output_tokens and batch must be 1 or more")
    utilization = settings.get("gpu_memory_utilization")
    usable = usable_bytes(device, utilization)
    wanted = "auto" if settings is profile.settings else str(settings["precision"])
    limit = min(int(settings.get("max_model_len", shape.max_model_len)), shape.max_model_len)
    chosen: str | None
    try:
        choice = choose_precision(
            wanted,
            device,
            shape.bytes_by_precision(),
            profile=profile,
            activations=shape.activation_bytes(min(limit, SHORTEST)),
            utilization=utilization,
        )
        chosen, why = choice.precision, choice.reason
    except ConfigError as exc:
        chosen, why = None, str(exc)
    blocks = -(-(prompt_tokens + output_tokens) // _BLOCK)
    request = shape.kv_bytes(blocks * _BLOCK, kv_dtype)
    cache = int(settings["kv_cache_memory_gb"] * GIB) if "kv_cache_memory_gb" in settings else None
    step = shape.kv_bytes(prompt_tokens + output_tokens // 2, kv_dtype)
    bandwidth = bandwidth_bytes_s or device.memory_bandwidth_bytes_s
    rows = []
    for precision in shape.precisions:
        weights, read = shape.weight_bytes(precision), shape.decode_bytes(precision)
        room = None if usable is None else usable - weights
        length = shape.longest_request(limit, kv_dtype, room, cache)
        left = None if room is None else room - shape.activation_bytes(length)
        longest = shape.kv_bytes(length, kv_dtype)
        held = left if left is None or cache is None else min(left, cache)
        rows.append(
            PrecisionPlan(
                precision=precision,
                weight_bytes=weights,
                fits=None if left is None else left >= longest,
                max_model_len=length,
                requests=None if held is None else max(0, held // request),
                decode_bytes=read,
                decode_tps=_ceiling(bandwidth, read + step, 1),
                decode_tps_batch=_ceiling(bandwidth, read + batch * step, batch),
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
        kv_cache_dtype=kv_dtype,
        kv_bytes_per_token=shape.kv_bytes(1, kv_dtype),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batch=batch,
        head=shape.head_precision,
        usable_bytes=usable,
        bandwidth_bytes_s=bandwidth,
        rows=tuple(rows),
        visuals=_visuals(
            shape, next((r.max_model_len for r in rows if r.precision == chosen), limit)
        ),
        notes=_notes(shape, device, bandwidth),
    )


def _visuals(shape: ModelShape, max_model_len: int) -> VisualPlan | None:
    if shape.activations is None:
        return None
    frames = min(_MOLMO2_FRAMES, frames_within(max_model_len))
    return VisualPlan(
        max_model_len=max_model_len,
        image_tokens=_MOLMO2_IMAGES,
        frames=frames,
        seconds=(frames - 1) / _MOLMO2_FPS,
        encode_bytes=shape.activations.encode(max_model_len),
        prefill_bytes=shape.activations.prefill(max_model_len),
    )


def _ceiling(bandwidth: float | None, step_bytes: int, tokens: int) -> float | None:
    """Tokens per second of decode steps that read and give so much."""
    return None if bandwidth is None else tokens * bandwidth / step_bytes


def _row_note(
    shape: ModelShape, precision: str, device: DeviceInfo, left: int | None, longest: int
) -> str:
    notes = []
    if left is not None and left < longest:
        notes.append(f"{(longest - left) / 1e9:.1f} GB too large with one full-length request")
    quantised_head = shape.head_precision != "none"
    if shape.stored is None and (precision in ("w4a16", "nvfp4") or quantised_head):
        notes.append("needs a checkpoint quantised beforehand")
    if precision == "fp8" and device.kind == "cpu":
        notes.append("emulated on CPUs, slower than BF16")
    return "; ".join(notes)


def _notes(shape: ModelShape, device: DeviceInfo, bandwidth: float | None) -> tuple[str, ...]:
    notes = []
    if bandwidth is None:
        notes.append(
            f"the memory bandwidth of {device.name} is not in the table of published figures, so "
            "there are no ceilings"
        )
    if device.memory_available_bytes is None:
        notes.append("free memory is not known: usable memory is a fraction of the nominal size")
    if not shape.measured:
        notes.append("weights are computed from the configuration, not read from files")
    if bandwidth is not None and bandwidth == device.memory_bandwidth_bytes_s:
        notes.append(f"bandwidth: {device.bandwidth_source}")
    return tuple(notes)
