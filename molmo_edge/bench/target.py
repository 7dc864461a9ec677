"""Which engine a benchmark measures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STUB = "stub"
CACHES_OFF: dict[str, Any] = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0.0}
CACHES_ON: dict[str, Any] = {"enable_prefix_caching": True, "mm_processor_cache_gb": 1.0}
"""Settings of the two engines. Only fresh images miss the encoder's cache: it has no switch."""


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
        return {**self.options, **config, **switch}

    def open(self, caches: bool) -> AbstractContextManager[Any]:
        """Build the engine."""
        from molmo_edge import EdgeVLM

        vlm: AbstractContextManager[Any] = EdgeVLM(self.model, **self.arguments(caches))
        return vlm

    def start_command(self, image: Path | None = None) -> tuple[str, ...]:
        """The command of a fresh process for the cold-start scenario."""
        request = {
            "model": self.model,
            "options": self.arguments(None),
            "image": None if image is None else str(image.resolve()),
        }
        return (sys.executable, "-m", "molmo_edge.bench.coldstart", json.dumps(request))
