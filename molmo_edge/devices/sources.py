"""Sources of device facts, injectable so that recorded machines can be replayed.

A source that is missing, unreadable or failing gives ``None``; nothing raises.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pynvml


@dataclass(frozen=True)
class Sources:
    """Everything that detection reads."""

    root: Path = Path("/")  # /proc, /sys, /dev and /etc are read below it
    nvml: Any = None  # the ``pynvml`` module or an object with its functions
    memory: Callable[[], tuple[int, int] | None] = lambda: None  # total and available bytes
    environ: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""  # processor architecture as ``uname -m`` prints it

    def path(self, path: str | Path) -> Path:
        """Resolve a string below the root; a ``Path`` is below it already."""
        return self.root / path.lstrip("/") if isinstance(path, str) else path

    def read(self, path: str | Path) -> str | None:
        """Text of a file without surrounding whitespace and NULs."""
        try:
            return self.path(path).read_text(errors="replace").strip("\0 \t\r\n")
        except OSError:
            return None

    def read_int(self, path: str | Path) -> int | None:
        """A file that holds one integer."""
        try:
            return int(self.read(path) or "")
        except ValueError:
            return None

    def entries(self, path: str) -> list[Path]:
        """Sorted entries of a directory; empty when it cannot be listed."""
        try:
            return sorted(self.path(path).iterdir())
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        return os.path.exists(self.path(path))  # noqa: PTH110  never raises, unlike Path.exists


def system_sources() -> Sources:
    """The sources of this machine."""
    return Sources(
        nvml=pynvml, memory=_memory, environ=dict(os.environ), machine=platform.machine()
    )


def _memory() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)
