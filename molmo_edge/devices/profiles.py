"""Device profiles: default settings for each kind of device, as TOML files.

A profile fits the devices that its ``[match]`` table describes, so a device is added by adding a
file to ``profiles/``.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.specs import GIB
from molmo_edge.errors import ConfigError

_DIRECTORY = Path(__file__).with_name("profiles")


@dataclass(frozen=True)
class Profile:
    """Settings for one kind of device."""

    name: str  # as ``--profile`` takes it
    description: str  # one line
    # Conditions: kind, capability (a list), integrated and memory_gb_max (GiB).
    match: Mapping[str, Any]
    settings: Mapping[str, Any]  # of `EdgeSettings`
    engine_args: Mapping[str, Any] = field(default_factory=dict)  # of `vllm.EngineArgs`
    env: Mapping[str, str] = field(default_factory=dict)  # to set before CUDA starts

    def as_settings(self) -> dict[str, Any]:
        """The settings, ``engine_args`` included if there are any."""
        arguments = {"engine_args": dict(self.engine_args)} if self.engine_args else {}
        return {**self.settings, **arguments}


def profile_names() -> list[str]:
    """Names of the profiles, sorted."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.toml"))


def load_profile(name: str) -> Profile:
    """Load a profile by name.

    Raises:
        ConfigError: no such profile; the message suggests the nearest and lists all.
    """
    names = profile_names()
    if name not in names:
        near = difflib.get_close_matches(name[:60].lower(), names, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown profile {name[:60]!r}: {hint}profiles are {', '.join(names)}, "
            "or auto to choose by the device"
        )
    return Profile(**tomllib.loads((_DIRECTORY / f"{name}.toml").read_text(encoding="utf-8")))


def select_profile(device: DeviceInfo) -> tuple[Profile, str]:
    """Return the most specific profile that fits the device, and the reason.

    Never fails: ``cuda`` fits every NVIDIA GPU and ``cpu`` everything else.
    """
    matches = [p for p in map(load_profile, profile_names()) if not _mismatches(p, device)]
    chosen = max(matches, key=lambda profile: len(profile.match))
    return chosen, f"{chosen.name}: {_traits(device)}"


def profile_warning(profile: Profile, device: DeviceInfo) -> str | None:
    """Return a warning if a profile is for another device, else ``None``."""
    unmet = _mismatches(profile, device)
    if not unmet:
        return None
    return (
        f"profile {profile.name} is for another device: {'; '.join(unmet)}. "
        f"{select_profile(device)[0].name} would fit {device.name}"
    )


def _mismatches(profile: Profile, device: DeviceInfo) -> list[str]:
    """Describe the conditions that a device does not meet; what is unknown is not met."""
    match, unmet = profile.match, []
    size = device.memory_total_bytes
    if device.kind != match["kind"]:
        unmet.append(f"it is for kind {match['kind']}, this device is {device.kind}")
    if "capability" in match and device.compute_capability not in match["capability"]:
        has = device.compute_capability or "unknown"
        wanted = " or ".join(match["capability"])
        unmet.append(f"it is for capability {wanted}, this device's is {has}")
    if "integrated" in match and device.integrated is not match["integrated"]:
        unmet.append(f"it is for {'shared' if match['integrated'] else 'discrete'} GPU memory")
    if "memory_gb_max" in match and (size is None or size > match["memory_gb_max"] * GIB):
        unmet.append(f"it is for {match['memory_gb_max']} GiB or less")
    return unmet


def _traits(device: DeviceInfo) -> str:
    if device.kind == "cpu":
        return "no usable NVIDIA GPU"
    parts = [device.name, device.sm or "capability unknown"]
    if device.integrated is not None:
        parts.append("memory shared with the CPU" if device.integrated else "memory of its own")
    if device.memory_total_bytes is not None:
        parts.append(f"{device.memory_total_bytes / GIB:.1f} GiB")
    return ", ".join(parts)
