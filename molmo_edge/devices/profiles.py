"""Device profiles: the starting settings for each kind of device, as data.

A profile is a TOML file beside this module. Which one fits is decided by its ``[match]`` table
alone, so a device is added by adding a file. This module knows no setting's meaning.
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

_FOLDER = Path(__file__).with_name("profiles")
_TABLES = ("match", "settings", "engine_args", "env")
_MATCH = ("kind", "capability", "integrated", "memory_gb_min", "memory_gb_max")


@dataclass(frozen=True)
class Profile:
    """Settings for one kind of device; nothing in it can be changed.

    Attributes:
        name: as ``--profile`` takes it.
        description: one line.
        match: what a device must be: ``kind``, ``capability`` (a list), ``integrated``,
            ``memory_gb_min`` and ``memory_gb_max`` (GiB).
        settings: names of ``EdgeSettings`` to values.
        engine_args: names of ``vllm.EngineArgs`` to values.
        env: environment variables to strings, to be set before CUDA starts.
    """

    name: str
    description: str
    match: Mapping[str, Any]
    settings: Mapping[str, Any]
    engine_args: Mapping[str, Any]
    env: Mapping[str, str]

    def as_settings(self) -> dict[str, Any]:
        """A fresh plain copy: the settings, with ``engine_args`` among them if there are any."""
        values: dict[str, Any] = _thaw(self.settings)
        if self.engine_args:
            values["engine_args"] = _thaw(self.engine_args)
        return values


@cache
def profile_names() -> tuple[str, ...]:
    """Names of the profiles, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


@cache
def load_profile(name: str) -> Profile:
    """The profile of a name.

    Raises:
        ConfigError: there is none; the message suggests the nearest and lists all.
    """
    names = profile_names()
    if name not in names:
        near = difflib.get_close_matches(name[:60].lower(), names, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        shown = name if len(name) <= 60 else name[:57] + "..."
        raise ConfigError(
            f"unknown profile {shown!r}: {hint}profiles are {', '.join(names)}, "
            "or auto to choose by the device"
        )
    return parse_profile(name, (_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def parse_profile(name: str, text: str) -> Profile:
    """A profile from the text of its file.

    Raises:
        ConfigError: not TOML, an unknown table or condition, or a value of the wrong kind.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"profile {name} is not valid TOML: {exc}") from exc
    unknown = sorted(set(data) - {"name", "description", *_TABLES})
    if unknown:
        raise ConfigError(f"profile {name} has unknown entries: {', '.join(unknown)}")
    if data.get("name") != name:
        raise ConfigError(f"profile {name} must have name = {name!r} at its top")
    tables = {table: data.get(table, {}) for table in _TABLES}
    for table, values in tables.items():
        if not isinstance(values, dict):
            raise ConfigError(f"profile {name}: {table} must be a table")
    wrong = sorted(set(tables["match"]) - set(_MATCH))
    if wrong or "kind" not in tables["match"]:
        expected = f"expected kind and any of {', '.join(_MATCH[1:])}"
        raise ConfigError(
            f"profile {name}: [match] has {', '.join(wrong) or 'no kind'}; {expected}"
        )
    not_text = sorted(k for k, value in tables["env"].items() if not isinstance(value, str))
    if not_text:
        raise ConfigError(f"profile {name}: [env] values must be strings: {', '.join(not_text)}")
    description = str(data.get("description", ""))
    return Profile(name, description, **{table: _freeze(tables[table]) for table in _TABLES})


def select_profile(device: DeviceInfo) -> tuple[Profile, str]:
    """The profile whose conditions fit the device, the most specific first, and why.

    Never fails: ``cuda`` fits every NVIDIA GPU and ``cpu`` everything else.
    """
    fitting = [p for p in map(load_profile, profile_names()) if not mismatches(p, device)]
    chosen = max(fitting, key=lambda profile: len(profile.match))
    return chosen, f"{chosen.name}: {_traits(device)}"


def mismatches(profile: Profile, device: DeviceInfo) -> list[str]:
    """Conditions of a profile that a device does not meet, in words; empty when it fits.

    What is unknown about the device counts as not met.
    """
    size = None if device.memory_total_bytes is None else device.memory_total_bytes / GIB
    found = []
    for condition, wanted in profile.match.items():
        if condition == "kind" and device.kind != wanted:
            found.append(f"it is for kind {wanted}, this device is {device.kind}")
        elif condition == "capability" and device.compute_capability not in wanted:
            is_now = device.compute_capability or "unknown"
            found.append(f"it is for capability {' or '.join(wanted)}, this device's is {is_now}")
        elif condition == "integrated" and device.integrated is not wanted:
            found.append(f"it is for {'shared' if wanted else 'separate'} GPU memory")
        elif condition == "memory_gb_min" and (size is None or size < wanted):
            found.append(f"it is for {wanted} GiB or more")
        elif condition == "memory_gb_max" and (size is None or size > wanted):
            found.append(f"it is for {wanted} GiB or less")
    return found


def profile_warning(profile: Profile, device: DeviceInfo) -> str | None:
    """One line when a profile was written for another device than this one, else ``None``."""
    wrong = mismatches(profile, device)
    if not wrong:
        return None
    better, _ = select_profile(device)
    return (
        f"profile {profile.name} was written for another device: {'; '.join(wrong)}. "
        f"{better.name} would fit {device.name}"
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
