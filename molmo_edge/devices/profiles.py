"""Device profiles: default settings for each kind of device, as TOML files.

A profile fits the devices that its ``[match]`` table describes, so a device is added by adding a
file to ``profiles/``.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_edge.devices.detect import DeviceInfo
from molmo_edge.devices.specs import GIB
from molmo_edge.errors import ConfigError, did_you_mean

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

    def as_settings(self) -> dict[str, Any]:
        """The settings, ``engine_args`` included if there are any."""
        arguments = {"engine_args": dict(self.engine_args)} if self.engine_args else {}
        return {**self.settings, **arguments}


def profile_names() -> list[str]:
    """Names of the profiles, sorted."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.toml"))


def load_profile(name: str) -> Profile:
    """Load a profile by name. Raises ConfigError, which suggests the nearest and lists all."""
    names = profile_names()
    if name not in names:
        raise ConfigError(
            f"Unknown profile {name[:60]!r}.{did_you_mean(name.lower(), names)} Profiles are "
            f"{', '.join(names)}, or auto to choose by the device."
        )
    return Profile(**tomllib.loads((_DIRECTORY / f"{name}.toml").read_text(encoding="utf-8")))


def select_profile(device: DeviceInfo) -> tuple[Profile, str]:
    """Return the most specific profile that fits the device, and the reason.

    Never fails: ``cuda`` fits every NVIDIA GPU and ``cpu`` everything else.
    """
    matches = [p for p in map(load_profile, profile_names()) if _fits(p, device)]
    chosen = max(matches, key=lambda profile: len(profile.match))
    traits = device.summary if device.kind == "cuda" else "no usable NVIDIA GPU"
    return chosen, f"{chosen.name}: {traits}"


def find_profile(name: str, device: DeviceInfo) -> Profile:
    """Return the profile of that name, or for "auto" the one that fits the device."""
    return select_profile(device)[0] if name == "auto" else load_profile(name)


def profile_warning(profile: Profile, device: DeviceInfo) -> str | None:
    """Return a warning if a profile is for another device, else ``None``."""
    if _fits(profile, device):
        return None
    purpose, _, _ = profile.description.partition(":")
    return (
        f"profile {profile.name} is for another device: {purpose}; "
        f"{select_profile(device)[0].name} would fit {device.name}"
    )


def _fits(profile: Profile, device: DeviceInfo) -> bool:
    """Whether a device meets the profile's conditions; what is unknown is not met."""
    match, size = profile.match, device.memory_total_bytes
    return (
        device.kind == match["kind"]
        and device.compute_capability in match.get("capability", [device.compute_capability])
        and device.integrated is match.get("integrated", device.integrated)
        and ("memory_gb_max" not in match or (size or math.inf) <= match["memory_gb_max"] * GIB)
    )
