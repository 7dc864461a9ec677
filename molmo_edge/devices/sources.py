"""Sources of device facts, injectable so that recorded machines can be replayed.

A source that is missing, unreadable or failing gives ``None``; nothing raises.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAX_BYTES = 1 << 20  # procfs and sysfs files are small; never read a huge file by mistake
_COMMAND_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Sources:
    """Everything that detection reads.

    Attributes:
        root: stands for ``/``; ``/proc``, ``/sys``, ``/dev`` and ``/etc`` are read below it.
        nvml: the ``pynvml`` module or an object with its functions; ``None``: no NVML.
        memory: returns (total, available) main memory in bytes, or ``None`` if unknown.
        run: maps a command to its standard output, or to ``None`` when it fails.
        environ: environment variables.
        machine: processor architecture as ``uname -m`` prints it.
    """

    root: Path = Path("/")
    nvml: Any = None
    memory: Callable[[], tuple[int, int] | None] = lambda: None
    run: Callable[[Sequence[str]], str | None] = lambda command: None
    environ: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""

    def path(self, path: str | Path) -> Path:
        """Resolve a string below the root; a ``Path`` is below it already."""
        return self.root / path.lstrip("/") if isinstance(path, str) else path

    def read(self, path: str | Path) -> str | None:
        """Text of a small file without surrounding whitespace and NULs."""
        try:
            with self.path(path).open("rb") as file:
                raw = file.read(_MAX_BYTES)
        except (OSError, ValueError):
            return None
        return raw.decode("utf-8", errors="replace").strip("\0 \t\r\n")

    def read_int(self, path: str | Path) -> int | None:
        """A file that holds one integer."""
        try:
            return int(self.read(path) or "")
        except ValueError:
            return None

    def entries(self, path: str | Path) -> list[Path]:
        """Sorted entries of a directory; empty when it cannot be listed."""
        try:
            return sorted(self.path(path).iterdir())
        except (OSError, ValueError):
            return []

    def exists(self, path: str) -> bool:
        return os.path.exists(self.path(path))  # noqa: PTH110  never raises, unlike Path.exists

    def which(self, program: str) -> str | None:
        """First match of a program on ``PATH``, below the root."""
        directories = self.environ.get("PATH", "").split(os.pathsep)
        search = os.pathsep.join(str(self.path(d)) for d in directories if d)
        return shutil.which(program, path=search or os.devnull)


def system_sources() -> Sources:
    """The sources of this machine. Imports ``pynvml`` if it is installed; starts nothing."""
    try:
        import pynvml
    except Exception:  # a broken installation must not stop detection
        pynvml = None
    return Sources(
        nvml=pynvml,
        memory=_memory,
        run=_run,
        environ=dict(os.environ),
        machine=platform.machine(),
    )


def _memory() -> tuple[int, int] | None:
    try:
        import psutil

        memory = psutil.virtual_memory()
    except Exception:  # the same
        return None
    return int(memory.total), int(memory.available)


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
