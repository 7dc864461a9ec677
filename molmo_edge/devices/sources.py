"""Where device facts are read from, each injectable, so that recorded machines can be replayed.

This module knows no device: it reads files below a root, calls NVML functions by name and runs
short commands. Nothing in it raises for a source that is missing, unreadable or failing.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAX_BYTES = 1 << 20  # procfs and sysfs files are small; never read a huge file by mistake
_COMMAND_TIMEOUT_S = 2.0


def run_command(command: Sequence[str]) -> str | None:
    """Standard output of a command that ends well within 2 s, else ``None``."""
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


def _no_command(command: Sequence[str]) -> str | None:
    return None


@dataclass(frozen=True)
class Sources:
    """Everything detection may look at.

    Attributes:
        root: what stands for ``/``; ``/proc``, ``/sys``, ``/dev`` and ``/etc`` are read below it.
        nvml: the ``pynvml`` module or anything with its functions; ``None``: no NVML here.
        run: a command to its standard output, or ``None`` when it fails.
        environ: the environment variables.
        machine: the processor architecture as ``uname -m`` names it.
    """

    root: Path = Path("/")
    nvml: Any = None
    run: Callable[[Sequence[str]], str | None] = _no_command
    environ: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""

    @property
    def live(self) -> bool:
        """Whether these are this machine's own files and not a recording."""
        return self.root == Path("/")

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: str | Path) -> str | None:
        """Text of a small file without surrounding blanks and NULs; ``None`` if unreadable."""
        target = self.path(path) if isinstance(path, str) else path
        try:
            with target.open("rb") as handle:
                raw = handle.read(_MAX_BYTES)
        except (OSError, ValueError):
            return None
        return raw.decode("utf-8", errors="replace").strip("\0 \t\r\n")

    def read_int(self, path: str | Path) -> int | None:
        """A file that holds one whole number, else ``None``."""
        text = self.read(path)
        try:
            return None if text is None else int(text)
        except ValueError:
            return None

    def entries(self, path: str | Path) -> list[Path]:
        """Sorted children of a folder; empty when it cannot be listed."""
        target = self.path(path) if isinstance(path, str) else path
        try:
            return sorted(target.iterdir())
        except (OSError, ValueError):
            return []

    def exists(self, path: str) -> bool:
        try:
            return self.path(path).exists()
        except (OSError, ValueError):
            return False

    def which(self, program: str) -> Path | None:
        """First match of a program on this environment's ``PATH``, below the root."""
        for folder in self.environ.get("PATH", "").split(os.pathsep):
            candidate = self.path(folder) / program
            try:
                if folder and candidate.is_file() and os.access(candidate, os.X_OK):
                    return candidate
            except (OSError, ValueError):
                continue
        return None


def system_sources() -> Sources:
    """The sources of this machine. Imports ``pynvml`` if it is installed; starts nothing."""
    try:
        import pynvml
    except Exception:  # a broken install must not stop detection
        pynvml = None
    return Sources(
        root=Path("/"),
        nvml=pynvml,
        run=run_command,
        environ=dict(os.environ),
        machine=platform.machine(),
    )
