"""NVML calls that return a value or ``None``.

Jetson drivers answer "Not Supported" to most calls and differ between releases, so every call is
tried on its own, also after a failure.
"""

from __future__ import annotations

from typing import Any

from molmo_edge.devices.sources import Sources

# Constants of nvml.h, so that a recorded NVML needs functions only.
CLOCK_GRAPHICS, CLOCK_MEMORY = 0, 2
# Reasons for lower clocks: power limit, heat, hardware brakes. Not: an idle GPU, clocks set by the
# user, GPUs kept in step.
_THROTTLED = 0x04 | 0x08 | 0x20 | 0x40 | 0x80
# No driver, no such GPU: ordinary, not a failure.
_ABSENT = ("NVMLError_LibraryNotFound", "NVMLError_InvalidArgument", "NVMLError_NotFound")


def visible_gpu(sources: Sources) -> str | None:
    """Index or UUID of the GPU that CUDA uses first; None if ``CUDA_VISIBLE_DEVICES`` hides all."""
    first = sources.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return first if first.isdecimal() or first.startswith(("GPU-", "MIG-")) else None


class Nvml:
    """An NVML session on the GPU that CUDA uses first, as a context manager.

    ``handle`` is ``None`` when there is no usable GPU; ``error`` is NVML's error message if it
    failed.
    """

    def __init__(self, sources: Sources) -> None:
        self._nvml = sources.nvml
        self._gpu = visible_gpu(sources)
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
