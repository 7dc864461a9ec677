"""NVML calls that return a value or ``None``.

Jetson drivers answer "Not Supported" to most calls and differ between releases, so every call is
tried on its own, also after a failure.
"""

from __future__ import annotations

from typing import Any

from molmo_edge.devices.sources import Sources

# Constants of nvml.h, so that a recorded NVML needs functions only.
CLOCK_GRAPHICS, CLOCK_MEMORY = 0, 2
TEMPERATURE_GPU = 0
# Reasons for lower clocks: power limit, heat, hardware brakes. Not: an idle GPU, clocks set by the
# user, GPUs kept in step.
_THROTTLED = 0x04 | 0x08 | 0x20 | 0x40 | 0x80


def visible_gpu(sources: Sources) -> str | None:
    """Index or UUID of the GPU that CUDA uses first; None if ``CUDA_VISIBLE_DEVICES`` hides all."""
    first = sources.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return first if first.isdecimal() or first.startswith(("GPU-", "MIG-")) else None


class Nvml:
    """An NVML session on the GPU that CUDA uses first, as a context manager.

    ``handle`` is ``None`` when there is no usable GPU; ``error`` is then NVML's error message, or
    ``None`` if NVML is not installed.
    """

    def __init__(self, sources: Sources) -> None:
        self._nvml = sources.nvml
        self._gpu = visible_gpu(sources)
        self._open = False
        self.handle: Any = None
        self.index: int | None = None
        self.count: int | None = None
        self.error: str | None = None

    def __enter__(self) -> Nvml:
        if self._nvml is None:
            return self
        try:
            self._nvml.nvmlInit()
        except Exception as exc:
            # A missing library means no NVIDIA driver: ordinary, not a failure.
            if type(exc).__name__ != "NVMLError_LibraryNotFound":
                self.error = str(exc).strip() or type(exc).__name__
            return self
        self._open = True
        count = self.get("nvmlDeviceGetCount")
        self.count = count if isinstance(count, int) else None
        if self.count and self._gpu is not None:
            self._select(self._gpu, self.count)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._open:
            self._open = False
            self.handle = None
            self.get("nvmlShutdown")

    def _select(self, gpu: str, count: int) -> None:
        if gpu.isdecimal():
            index = int(gpu) if int(gpu) < count else None
        else:  # CUDA also takes the beginning of a UUID
            index = next((i for i in range(count) if self._uuid(i).startswith(gpu)), None)
            if index is None:  # a MIG instance
                self.handle = self.get("nvmlDeviceGetHandleByUUID", gpu)
        if index is None:
            return
        self.index = index
        try:
            self.handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        except Exception as exc:
            self.error = str(exc).strip() or type(exc).__name__

    def _uuid(self, index: int) -> str:
        handle = self.get("nvmlDeviceGetHandleByIndex", index)
        return text(self.get("nvmlDeviceGetUUID", handle)) or ""

    def get(self, function: str, *args: Any) -> Any:
        """Result of an NVML function, ``None`` when it is missing, unsupported or failing."""
        try:
            return getattr(self._nvml, function)(*args)
        except Exception:
            return None

    def device(self, function: str, *args: Any) -> Any:
        """Like ``get``, for a function whose first argument is the GPU."""
        return None if self.handle is None else self.get(function, self.handle, *args)

    def number(self, function: str, *args: Any) -> int | None:
        """Like ``device``, for a function that returns an integer."""
        value = self.device(function, *args)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def throttled(self) -> bool | None:
        """Whether power or heat lowers the clocks now."""
        reasons = self.number("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # the function's name before driver 535
            reasons = self.number("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if reasons is None else bool(reasons & _THROTTLED)


def text(value: Any) -> str | None:
    """NVML strings: ``bytes`` in old bindings, ``str`` in new ones."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return None if value is None else str(value)
