"""Which precision the weights get.

Decided before anything is loaded: a load that runs out of memory after minutes, or one that
silently leaves the weights unquantised, is what these rules are for.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.profiles import Profile, select_profile
from molmo_edge.errors import ConfigError

WORKSPACE_BYTES = 1 << 30
"""Set aside beside weights and cache for the CUDA context, activations and graphs: an allowance."""

SYSTEM_SHARE = 0.15
"""Share of shared or main memory left to everything else where free memory is not known."""

DEFAULT_UTILIZATION = 0.9

NAMES = ("auto", "bf16", "fp8", "w4a16", "nvfp4")

_REFUSED = {
    "nvfp4_per_token": (
        "vLLM applies it to mixture-of-experts layers only and would silently leave every dense "
        "layer in BF16; use a checkpoint quantised to nvfp4"
    ),
    "int8_per_channel_weight_only": (
        "vLLM applies it to mixture-of-experts layers only and would silently leave every dense "
        "layer in BF16; use fp8, or a checkpoint quantised to w4a16"
    ),
    "bitsandbytes": (
        "vLLM 0.32 no longer loads bitsandbytes; use fp8, or a checkpoint quantised to w4a16"
    ),
    "bnb": "vLLM 0.32 no longer loads bitsandbytes; use fp8, or a checkpoint quantised to w4a16",
}

_Fits = Callable[[str], bool]


@dataclass(frozen=True)
class Choice:
    """A precision and why.

    Attributes:
        precision: "bf16", "fp8", "w4a16", "nvfp4", or what a quantised checkpoint holds.
        reason: one line for a person.
        fallback: whether it is not what was wished for, so that the reason should be shown.
    """

    precision: str
    reason: str
    fallback: bool = False


def usable_bytes(device: DeviceInfo, utilization: float | None = None) -> int | None:
    """Memory that weights and KV cache may take, workspace already taken off.

    On a separate GPU ``utilization`` (default 0.9) of its memory, and no more than is free; on
    shared or main memory what is free. ``None`` if the device's memory is not known.
    """
    total, free = device.memory_total_bytes, device.memory_available_bytes
    if total is None:
        return None
    if device.kind == "cuda" and not device.integrated:
        limit = int(total * (DEFAULT_UTILIZATION if utilization is None else utilization))
    else:
        limit = int(total * (1 - SYSTEM_SHARE)) if free is None else free
    return max(0, (limit if free is None else min(limit, free)) - WORKSPACE_BYTES)


def choose_precision(
    requested: str,
    device: DeviceInfo,
    model_bytes_by_precision: Mapping[str, int],
    *,
    profile: Profile | None = None,
    kv_bytes: int = 0,
    utilization: float | None = None,
    plain: str = "BF16",
) -> Choice:
    """The precision to load a model in.

    Args:
        requested: "auto" or a name of ``NAMES``.
        device: where it will run.
        model_bytes_by_precision: bytes of all weights at each precision this checkpoint can be
            loaded in, as ``ModelShape.bytes_by_precision()`` gives them.
        profile: whose ``precision`` "auto" stands for; the device's own if ``None``.
        kv_bytes: KV cache that must fit beside the weights.
        utilization: share of a separate GPU's memory that may be used.
        plain: what messages call weights that are not quantised.

    Raises:
        ConfigError: an unknown name, one that would leave dense weights unquantised, a precision
            this checkpoint does not have, or weights that do not fit. "auto" fails only when
            nothing fits.
    """
    check_precision_name(requested)
    available = dict(model_bytes_by_precision)
    if not available:
        raise ConfigError("the model can be loaded in no precision that this library knows")
    usable = usable_bytes(device, utilization)

    def fits(name: str) -> bool:
        return usable is None or available[name] + kv_bytes <= usable

    stored = next(iter(available)) if len(available) == 1 else None
    if stored is not None and stored != "bf16":
        if stored in _REFUSED:
            raise ConfigError(f"the checkpoint is quantised with {stored}: {_REFUSED[stored]}")
        if requested not in ("auto", stored):
            raise ConfigError(
                f"precision {requested} was asked for, but the checkpoint is quantised to "
                f"{stored}; use precision auto, or the unquantised checkpoint"
            )
        if not fits(stored):
            raise _no_room(stored, device, available, kv_bytes, usable, plain)
        return Choice(stored, "as stored")
    if requested != "auto":
        if requested not in available:
            raise ConfigError(
                f"precision {requested} needs a checkpoint that is already quantised, and this one "
                f"is not: molmo-edge quantize MODEL OUT --scheme {requested}"
            )
        if not fits(requested):
            raise _no_room(requested, device, available, kv_bytes, usable, plain)
        return Choice(requested, "asked for")
    return _automatic(device, available, profile, fits, kv_bytes, usable, plain)


def _automatic(
    device: DeviceInfo,
    available: Mapping[str, int],
    profile: Profile | None,
    fits: _Fits,
    kv_bytes: int,
    usable: int | None,
    plain: str,
) -> Choice:
    source = profile or select_profile(device)[0]
    wished = str(source.settings.get("precision", "auto"))
    if wished not in available:
        wished = "bf16" if "bf16" in available else next(iter(available))
    if fits(wished):
        known = "" if usable is not None else "; memory unknown, so not checked"
        return Choice(wished, f"profile {source.name}{known}")
    # FP8 on a CPU is emulated: slower than not starting would be honest about.
    if wished == "bf16" and "fp8" in available and device.kind == "cuda" and fits("fp8"):
        return Choice(
            "fp8",
            f"{plain} weights ({_gb(available['bf16'])}) do not fit {_gb(usable)} of usable memory "
            f"on {device.name}: loading them in FP8 ({_gb(available['fp8'])})",
            fallback=True,
        )
    raise _no_room(wished, device, available, kv_bytes, usable, plain)


def check_quantization(name: str) -> None:
    """Refuses a value of vLLM's own ``quantization`` that leaves dense weights as they are.

    Raises:
        ConfigError: with the reason. Names this library knows nothing of are let through.
    """
    if (why := _REFUSED.get(name.strip().lower())) is not None:
        raise ConfigError(f"quantization {name.strip().lower()} is refused: {why}")


def check_precision_name(name: str) -> None:
    """Refuses a name that is not one of ``NAMES``.

    Raises:
        ConfigError: with the reason for a name vLLM knows but that must not be used.
    """
    if name in NAMES:
        return
    folded = name.strip().lower()
    for refused, why in _REFUSED.items():
        if folded == refused:
            raise ConfigError(f"precision {refused} is refused: {why}")
    near = difflib.get_close_matches(folded[:60], NAMES, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown precision {name[:60]!r}: {hint}expected {', '.join(NAMES)}")


def _no_room(
    name: str,
    device: DeviceInfo,
    available: Mapping[str, int],
    kv_bytes: int,
    usable: int | None,
    plain: str,
) -> ConfigError:
    room = 0 if usable is None else usable
    smaller = [n for n, size in available.items() if n != name and size + kv_bytes <= room]
    if device.kind == "cpu":
        # FP8 fits a CPU's memory, but saying so must not look like advice.
        advice = "use a checkpoint quantised to w4a16, or a machine with more memory"
    elif smaller:
        advice = f"precision {' or '.join(smaller)} fits"
    else:
        advice = "use a checkpoint quantised to w4a16 or nvfp4, or free memory"
    kv = f" and {_gb(kv_bytes)} of KV cache" if kv_bytes else ""
    label = plain if name == "bf16" else name.upper()
    return ConfigError(
        f"{label} weights ({_gb(available[name])}){kv} do not fit {_gb(usable)} of usable "
        f"memory on {device.name}; {advice}"
    )


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
