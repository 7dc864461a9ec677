"""Device profiles: default settings for each kind of device, as TOML files.

A profile fits the devices that its ``[match]`` table describes, so a device is added by adding a
file to ``profiles/``.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.specs import GIB
from molmo_edge.errors import ConfigError

_DIRECTORY = Path(__file__).with_name("profiles")
_TABLES = ("match", "settings", "engine_args", "env")
_MATCH = ("kind", "capability", "integrated", "memory_gb_min", "memory_gb_max")


@dataclass(frozen=True)
class Profile:
    """Immutable settings for one kind of device.

    Attributes:
        name: as ``--profile`` takes it.
        description: one line.
        match: conditions on the device: ``kind``, ``capability`` (a list), ``integrated``,
            ``memory_gb_min`` and ``memory_gb_max`` (GiB).
        settings: values of ``EdgeSettings``.
        engine_args: values of ``vllm.EngineArgs``.
        env: environment variables to set before CUDA starts.
    """

    name: str
    description: str
    match: Mapping[str, Any]
    settings: Mapping[str, Any]
    engine_args: Mapping[str, Any]
    env: Mapping[str, str]

    def as_settings(self) -> dict[str, Any]:
        """Return a mutable copy of the settings, ``engine_args`` included if there are any."""
        values: dict[str, Any] = _thaw(self.settings)
        return values | ({"engine_args": _thaw(self.engine_args)} if self.engine_args else {})


@cache
def profile_names() -> tuple[str, ...]:
    """Names of the profiles, sorted."""
    return tuple(sorted(path.stem for path in _DIRECTORY.glob("*.toml")))


@cache
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
    return parse_profile(name, (_DIRECTORY / f"{name}.toml").read_text(encoding="utf-8"))


def parse_profile(name: str, text: str) -> Profile:
    """Parse the text of a profile's file.

    Raises:
        ConfigError: invalid TOML, an unknown table or condition, or a value of the wrong type.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"profile {name} is not valid TOML: {exc}") from exc
    if unknown := sorted(set(data) - {"name", "description", *_TABLES}):
        raise ConfigError(f"profile {name} has unknown entries: {', '.join(unknown)}")
    if data.get("name") != name:
        raise ConfigError(f"profile {name} must have name = {name!r} at its top")
    tables = {table: data.get(table, {}) for table in _TABLES}
    for table, values in tables.items():
        if not isinstance(values, dict):
            raise ConfigError(f"profile {name}: {table} must be a table")
    unknown = sorted(set(tables["match"]) - set(_MATCH))
    if unknown or "kind" not in tables["match"]:
        raise ConfigError(
            f"profile {name}: [match] has {', '.join(unknown) or 'no kind'}; "
            f"expected kind and any of {', '.join(_MATCH[1:])}"
        )
    if wrong := sorted(k for k, value in tables["env"].items() if not isinstance(value, str)):
        raise ConfigError(f"profile {name}: [env] values must be strings: {', '.join(wrong)}")
    description = str(data.get("description", ""))
    return Profile(name, description, **{table: _freeze(tables[table]) for table in _TABLES})


def select_profile(device: DeviceInfo) -> tuple[Profile, str]:
    """Return the most specific profile that fits the device, and the reason.

    Never fails: ``cuda`` fits every NVIDIA GPU and ``cpu`` everything else.
    """
    matches = [p for p in map(load_profile, profile_names()) if not mismatches(p, device)]
    chosen = max(matches, key=lambda profile: len(profile.match))
    return chosen, f"{chosen.name}: {_traits(device)}"


def mismatches(profile: Profile, device: DeviceInfo) -> list[str]:
    """Describe the conditions of a profile that a device does not meet; empty when it fits.

    What is unknown about the device counts as not met.
    """
    size = None if device.memory_total_bytes is None else device.memory_total_bytes / GIB
    unmet = []
    for condition, wanted in profile.match.items():
        if condition == "kind" and device.kind != wanted:
            unmet.append(f"it is for kind {wanted}, this device is {device.kind}")
        elif condition == "capability" and device.compute_capability not in wanted:
            has = device.compute_capability or "unknown"
            unmet.append(f"it is for capability {' or '.join(wanted)}, this device's is {has}")
        elif condition == "integrated" and device.integrated is not wanted:
            unmet.append(f"it is for {'shared' if wanted else 'discrete'} GPU memory")
        elif condition == "memory_gb_min" and (size is None or size < wanted):
            unmet.append(f"it is for {wanted} GiB or more")
        elif condition == "memory_gb_max" and (size is None or size > wanted):
            unmet.append(f"it is for {wanted} GiB or less")
    return unmet


def profile_warning(profile: Profile, device: DeviceInfo) -> str | None:
    """Return a warning if a profile is for another device, else ``None``."""
    unmet = mismatches(profile, device)
    if not unmet:
        return None
    return (
        f"profile {profile.name} is for another device: {'; '.join(unmet)}. "
        f"{select_profile(device)[0].name} would fit {device.name}"
    )


def _traits(device: DeviceInfo) -> str:
    if device.kind == "cpu":
        return "no usable NVIDIA GPU"
    parts = [device.name, device.sm or "capability unknown"]
    if device.integrated is not None:
        parts.append("memory shared with the CPU" if device.integrated else "memory of its own")
    if device.memory_total_bytes is not None:
        parts.append(f"{device.memory_total_bytes / GIB:.1f} GiB")
    return ", ".join(parts)


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _freeze(item) for key, item in value.items()})
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value
