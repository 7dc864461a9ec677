"""NVML behind one rule: a value, or ``None`` when the driver does not give it.

Jetson drivers answer "Not Supported" to most calls and differ from release to release, so every
call is tried on its own and no failure says anything about the next one.
"""

from __future__ import annotations

from typing import Any

from molmo_edge.devices.sources import Sources

# Numbers of nvml.h, so that a stand-in for pynvml needs functions only.
CLOCK_GRAPHICS, CLOCK_MEMORY = 0, 2
TEMPERATURE_GPU = 0
# Reasons for clocks below what the load asks for: the power limit, heat, and the hardware's own
# brakes. An idle GPU, clocks that the user set, and GPUs kept in step have others.
_SLOWED = 0x04 | 0x08 | 0x20 | 0x40 | 0x80


def gpus_hidden(sources: Sources) -> bool:
    """Whether ``CUDA_VISIBLE_DEVICES`` leaves no GPU to this process."""
    visible = sources.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return False
    first = visible.split(",")[0].strip()
    return not (first.isdigit() or first.startswith(("GPU-", "MIG-")))


class Nvml:
    """One opened NVML session on the GPU that CUDA would use first.

    Use as a context manager. ``handle`` is ``None`` when there is no usable GPU, and ``error``
    then says why NVML could not help (``None`` if it simply is not there).
    """

    def __init__(self, sources: Sources) -> None:
        self._nvml = sources.nvml
        self._visible = sources.environ.get("CUDA_VISIBLE_DEVICES")
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
            # No library: no NVIDIA driver, which is ordinary and no failure.
            if type(exc).__name__ != "NVMLError_LibraryNotFound":
                self.error = _words(exc)
            return self
        self._open = True
        count = self.get("nvmlDeviceGetCount")
        self.count = count if isinstance(count, int) else None
        if self.count:
            self._select()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._open:
            self._open = False
            self.handle = None
            self.get("nvmlShutdown")

    def _select(self) -> None:
        first = None if self._visible is None else self._visible.split(",")[0].strip()
        if first is None:
            self.index = 0
        elif first.isdigit():
            self.index = int(first)
        elif first.startswith(("GPU-", "MIG-")):
            self.handle = self.get("nvmlDeviceGetHandleByUUID", first)
            if self.handle is not None:
                return
            self.index = self._index_of(first)  # CUDA also takes the beginning of a UUID
        else:
            return  # "", "-1", "none": CUDA shows no device, so neither do we
        if self.index is None or self.count is None or self.index >= self.count:
            self.index = None
            return
        try:
            self.handle = self._nvml.nvmlDeviceGetHandleByIndex(self.index)
        except Exception as exc:
            self.error = _words(exc)

    def _index_of(self, uuid: str) -> int | None:
        for index in range(self.count or 0):
            handle = self.get("nvmlDeviceGetHandleByIndex", index)
            found = None if handle is None else self.get("nvmlDeviceGetUUID", handle)
            if found is not None and text(found).startswith(uuid):
                return index
        return None

    def get(self, function: str, *args: Any) -> Any:
        """Result of one NVML function, ``None`` when it is missing, unsupported or failing."""
        try:
            return getattr(self._nvml, function)(*args)
        except Exception:
            return None

    def device(self, function: str, *args: Any) -> Any:
        """Like ``get`` for a function whose first argument is the GPU."""
        return None if self.handle is None else self.get(function, self.handle, *args)

    def number(self, function: str, *args: Any) -> int | None:
        """A whole number the driver gives for this GPU, else ``None``."""
        value = self.device(function, *args)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def slowed(self) -> bool | None:
        """Whether power or heat holds the clocks down now; ``None`` when the driver is silent."""
        reasons = self.number("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # the function's name before driver 535
            reasons = self.number("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if reasons is None else bool(reasons & _SLOWED)

    def clock(self, kind: int) -> tuple[int | None, int | None] | None:
        """Current and maximum clock in MHz; ``None`` when neither is known."""
        current = self.number("nvmlDeviceGetClockInfo", kind)
        maximum = self.number("nvmlDeviceGetMaxClockInfo", kind)
        return None if current is None and maximum is None else (current, maximum)


def text(value: Any) -> str:
    """NVML strings: ``bytes`` in old bindings, ``str`` in new ones."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _words(exc: Exception) -> str:
    return str(exc).strip() or type(exc).__name__
