"""What detection reads: files, the environment and NVML, replaceable by a recorded machine.

A source that is missing, unreadable or failing gives ``None``; nothing raises.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pynvml

# Constants of nvml.h, so that a recorded NVML needs functions only.
CLOCK_GRAPHICS, CLOCK_MEMORY = 0, 2
# Reasons for lower clocks: power limit, heat, hardware brakes. Not: an idle GPU, clocks set by the
# user, GPUs kept in step.
_THROTTLED = 0x04 | 0x08 | 0x20 | 0x40 | 0x80
# No driver, no such GPU: ordinary, not a failure.
_ABSENT = ("NVMLError_LibraryNotFound", "NVMLError_InvalidArgument", "NVMLError_NotFound")


@dataclass(frozen=True)
class Sources:
    """Everything that detection reads."""

    root: Path = Path("/")  # /proc, /sys, /dev and /etc are read below it
    nvml: Any = None  # the ``pynvml`` module or an object with its functions
    memory: tuple[int, int] | None = None  # total and available bytes
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

    def visible_gpu(self) -> str | None:
        """Index or UUID of the GPU that CUDA uses first; None if the environment hides all."""
        first = self.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        return first if first.isdecimal() or first.startswith(("GPU-", "MIG-")) else None


def system_sources() -> Sources:
    """The sources of this machine."""
    memory = psutil.virtual_memory()
    return Sources(
        nvml=pynvml,
        memory=(int(memory.total), int(memory.available)),
        environ=dict(os.environ),
        machine=platform.machine(),
    )


class Nvml:
    """An NVML session on the GPU that CUDA uses first, as a context manager.

    ``handle`` is ``None`` when there is no usable GPU; ``error`` is NVML's error message if it
    failed. Jetson drivers support few calls, so each is tried on its own.
    """

    def __init__(self, sources: Sources) -> None:
        self._nvml = sources.nvml
        self._gpu = sources.visible_gpu()
        self._open = False
        self.handle: Any = None
        self.error: str | None = None

    def __enter__(self) -> Nvml:
        if self._nvml is None:
            return self
        try:
            self._nvml.nvmlInit()
            self._open = True
            if self._gpu is not None and self._gpu.isdecimal():
                self.handle = self._nvml.nvmlDeviceGetHandleByIndex(int(self._gpu))
            elif self._gpu is not None:
                self.handle = self._nvml.nvmlDeviceGetHandleByUUID(self._gpu)
        except Exception as exc:
            if type(exc).__name__ not in _ABSENT:
                self.error = str(exc)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._open:
            self._open = False
            self.handle = None
            self.get("nvmlShutdown")

    def get(self, function: str, *args: Any) -> Any:
        """Result of an NVML function, ``None`` when it is missing, unsupported or failing."""
        try:
            return getattr(self._nvml, function)(*args)
        except Exception:
            return None

    def device(self, function: str, *args: Any) -> Any:
        """Like ``get``, for a function whose first argument is the GPU."""
        return None if self.handle is None else self.get(function, self.handle, *args)

    def throttled(self) -> bool | None:
        """Whether power or heat lowers the clocks now."""
        reasons = self.device("nvmlDeviceGetCurrentClocksEventReasons")
        return None if reasons is None else bool(reasons & _THROTTLED)
