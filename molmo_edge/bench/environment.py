"""The engine that a benchmark measures, and what it runs with and on."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_edge.bench.document import Device, Environment, Model
from molmo_edge.engine import vllm_args
from molmo_edge.errors import BenchmarkError
from molmo_edge.models.hub import DEMO, STUB, STUBS, locate_cached
from molmo_edge.settings import resolve

PACKAGES = {"vllm": "vLLM", "torch": "torch", "transformers": "transformers",
            "molmo_edge": "molmo_edge", "python": "Python"}  # fmt: skip
"""Keys of ``Environment.software``, and the names to print."""


def integer_or_text(value: str) -> int | str:
    """``4`` as an integer; all else as it is, which the settings check."""
    return int(value) if value.isdecimal() else value


@dataclass(frozen=True)
class Target:
    """The arguments of ``EdgeVLM``; those left alone are absent from ``options``."""

    model: str | None = None
    config: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def choose(cls, default: str = STUB, *, config: Path | None = None, **options: Any) -> Target:
        """The user's choice; without a model of an option or the settings, it is `default`."""
        given = {k: v for k, v in options.items() if v is not None}
        resolved = resolve(given, config=config)
        settings = resolved.settings
        given.pop("model", None)
        if settings.load_format != "auto":
            given["load_format"] = settings.load_format
        return cls(settings.model if "model" in resolved.by_user else default, config, given)

    @classmethod
    def variants(cls, **options: Any) -> dict[str, Target]:
        """The choices of a user who gave one option several values, separated by commas, by label.

        Without a model of an option or the settings, it is the demo: answers of random weights say
        nothing.

        Raises:
            BenchmarkError: more than one option has several values, or two are the same.
            ModelError: one of several models is not there.
        """
        several = [name for name in options if name != "config" and "," in str(options[name])]
        if len(several) > 1:
            raise BenchmarkError(
                f"{' and '.join(several)} have several values; give them to one option only"
            )
        if not several:
            target = cls.choose(DEMO, **options)
            return {target.name: target}
        [name] = several
        values = [value.strip() for value in options[name].split(",")]
        if len({*values}) < len(values):
            raise BenchmarkError(f"{name} has the same value twice: {options[name]}")
        chosen = {
            f"{name}={value}": cls.choose(DEMO, **{**options, name: integer_or_text(value)})
            for value in values
        }
        if name == "model":  # now, not when its turn comes
            root = vllm_args.cache_root(resolve({}).settings)
            for value in values:
                locate_cached(value, root)
        return chosen

    @property
    def name(self) -> str:
        name = self.model or (self.config.stem if self.config else "default")
        return name.rstrip("/").rsplit("/", 1)[-1]

    @property
    def random_weights(self) -> bool:
        """True if the weights are random for certain."""
        return self.model in STUBS or self.options.get("load_format") == "dummy"

    def arguments(self, caches: bool | None) -> dict[str, Any]:
        """Keyword arguments of ``EdgeVLM``, its caches on, off or (None) as configured.

        Only fresh images miss the encoder's cache: it has no switch.
        """
        config = {} if self.config is None else {"config": str(self.config)}
        switch = {} if caches is None else {"enable_prefix_caching": caches}
        return {"model": self.model, **self.options, **config, **switch}

    def open(self, caches: bool) -> AbstractContextManager[Any]:
        from molmo_edge import EdgeVLM

        vlm: AbstractContextManager[Any] = EdgeVLM(**self.arguments(caches))
        return vlm

    def start_command(self, image: Path | None = None) -> tuple[str, ...]:
        """The command of a fresh process for the cold-start scenario."""
        start = {"engine": self.arguments(None), "image": image and str(image.resolve())}
        return (sys.executable, "-m", "molmo_edge.bench.coldstart", json.dumps(start))


def of(vlm: Any) -> Environment:
    """The environment of a started engine; what it reports beats what is installed."""
    reported = {
        "load_format": vlm.settings.load_format,
        "max_num_seqs": vlm.settings.max_num_seqs,
        **{name: value for name, value in vlm.environment.items() if value is not None},
    }
    model = Model.model_validate({**reported, "name": reported.pop("model", None)})
    device = detected_device()
    device.name = reported.pop("device", device.name)
    software = vllm_args.versions()
    other: dict[str, Any] = {"platform": platform.platform(terse=True)}
    for name, value in reported.items():
        if name in PACKAGES:
            software[name] = value
        elif name not in Model.model_fields:
            other[name] = value if isinstance(value, str | int | float) else str(value)
    return Environment(software=software, device=device, model=model, other=other)


def detected_device() -> Device:
    return Device.model_validate(vllm_args.engine_device().as_dict())


def software_line(environment: Environment) -> str:
    known = environment.software
    return ", ".join(f"{label} {known.get(name) or 'unknown'}" for name, label in PACKAGES.items())
