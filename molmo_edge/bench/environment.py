"""The engine that a benchmark measures, and what it runs with and on."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_edge.bench.document import Device, Environment, Model, Scalar
from molmo_edge.engine import vllm_args

STUB = "stub"
CACHES_OFF: dict[str, Any] = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0.0}
CACHES_ON: dict[str, Any] = {"enable_prefix_caching": True, "mm_processor_cache_gb": 1.0}
"""Settings of the two engines. Only fresh images miss the encoder's cache: it has no switch."""

PACKAGES = {"vllm": "vLLM", "torch": "torch", "transformers": "transformers",
            "molmo_edge": "molmo_edge", "python": "Python"}  # fmt: skip
"""Keys of ``Environment.software``, and the names to print."""

SAME_NAME = ("name", "kind", "power_mode", "cpu_governor", "cpu_count", "driver", "cuda",
             "machine", "in_container")  # fmt: skip
"""Fields of the document's device that DeviceInfo has too."""


@dataclass(frozen=True)
class Target:
    """The arguments of ``EdgeVLM``; those left alone are absent from ``options``."""

    model: str | None = None
    config: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def choose(cls, model: str | None, config: Path | None, options: Mapping[str, Any]) -> Target:
        """The user's choice; the stub where neither option, file nor environment name a model."""
        if model is None and config is None and not os.environ.get("MOLMO_EDGE_MODEL"):
            model = STUB
        return cls(model, config, {k: v for k, v in options.items() if v is not None})

    @property
    def name(self) -> str:
        """A short name for labels and files."""
        return self.model or (self.config.stem if self.config else "default")

    @property
    def random_weights(self) -> bool:
        """True if the weights are random for certain."""
        return self.model == STUB or self.options.get("load_format") == "dummy"

    def arguments(self, caches: bool | None) -> dict[str, Any]:
        """Keyword arguments of ``EdgeVLM``, its caches on, off or (None) as configured."""
        config = {} if self.config is None else {"config": str(self.config)}
        switch = {} if caches is None else CACHES_ON if caches else CACHES_OFF
        return {"model": self.model, **self.options, **config, **switch}

    def open(self, caches: bool) -> AbstractContextManager[Any]:
        """Build the engine."""
        from molmo_edge import EdgeVLM

        vlm: AbstractContextManager[Any] = EdgeVLM(**self.arguments(caches))
        return vlm

    def start_command(self, image: Path | None = None) -> tuple[str, ...]:
        """The command of a fresh process for the cold-start scenario."""
        start = {
            "engine": self.arguments(None),
            "image": None if image is None else str(image.resolve()),
        }
        return (sys.executable, "-m", "molmo_edge.bench.coldstart", json.dumps(start))


def of(vlm: Any) -> Environment:
    """The environment of a started engine; what it reports beats what is installed."""
    reported: dict[str, Any] = {
        key: value if isinstance(value, str | int | float | bool | None) else str(value)
        for key, value in sorted(vlm.environment.items())
    }
    device = detected_device()
    device.name = reported.pop("device", None) or device.name
    software = vllm_args.versions() | {
        name: reported.pop(name) for name in PACKAGES if name in reported
    }
    model: dict[str, Scalar] = {"name": reported.pop("model", None)}
    for name in Model.model_fields.keys() & {*reported, "max_num_seqs", "load_format"}:
        value = reported.pop(name, None)
        model[name] = getattr(vlm.settings, name, None) if value is None else value
    other = {"platform": platform.platform(terse=True), **reported}
    return Environment(
        software=software, device=device, model=Model.model_validate(model), other=other
    )


def detected_device() -> Device:
    """The device that the engine runs on, as the document has it."""
    device = vllm_args.engine_device()
    return Device(
        memory_bytes=device.memory_total_bytes,
        bandwidth_bytes_per_s=device.memory_bandwidth_bytes_s,
        power_limit_w=device.power_limit_w[0] if device.power_limit_w else None,
        clocks_mhz={name: current for name, (current, _) in device.clocks.items()},
        clocks_max_mhz={name: maximum for name, (_, maximum) in device.clocks.items()},
        **{name: getattr(device, name) for name in SAME_NAME},
    )


def software_line(environment: Environment) -> str:
    """The versions in one line, for every printed table."""
    known = environment.software
    return ", ".join(f"{label} {known.get(name) or 'unknown'}" for name, label in PACKAGES.items())
