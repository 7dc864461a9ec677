"""Recorded machines as sources, and a stand-in for NVML that answers from a recording."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml

from molmo_edge.devices.sources import Sources

DATA = Path(__file__).parents[1] / "data" / "devices"
MACHINES = sorted(path.parent.name for path in DATA.glob("*/machine.json"))

# Functions whose first argument is the GPU: key of the recording, and what to make of its value.
_ANSWERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "nvmlDeviceGetName": ("name", str),
    "nvmlDeviceGetCudaComputeCapability": ("capability", list),
    "nvmlDeviceGetMemoryInfo": ("memory", lambda memory: SimpleNamespace(**memory)),
    "nvmlDeviceGetClockInfo": ("clocks", lambda clocks, kind: clocks[str(kind)][0]),
    "nvmlDeviceGetMaxClockInfo": ("clocks", lambda clocks, kind: clocks[str(kind)][1]),
    "nvmlDeviceGetEnforcedPowerLimit": ("limits_mw", lambda limits: limits[0]),
    "nvmlDeviceGetPowerUsage": ("power_mw", int),
    "nvmlDeviceGetCurrentClocksEventReasons": ("clocks_event_reasons", int),
}


class RecordedNvml:
    """Answers as the recording says, and raises what the driver raises for all else."""

    def __init__(self, recording: dict[str, Any]) -> None:
        self.recording = recording
        self.open = 0

    def nvmlInit(self) -> None:
        if "error" in self.recording:
            raise pynvml.NVMLError(self.recording["error"])
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        devices: list[dict[str, Any]] = self.recording["devices"]
        if index >= len(devices):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return devices[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:
        for device in self.recording["devices"]:
            if device.get("uuid") == uuid:
                return dict(device)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlSystemGetDriverVersion(self) -> str:
        return str(self.recording["driver"])

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return int(self.recording["cuda"])

    def __getattr__(self, function: str) -> Callable[..., Any]:
        key, make = _ANSWERS[function]

        def answer(handle: dict[str, Any], *args: Any) -> Any:
            if key not in handle:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return make(handle[key], *args)

        return answer


def machine(name: str, root: Path | None = None, **changes: Any) -> Sources:
    """A recorded machine; ``root`` replaces its files, ``changes`` its sources."""
    recording = json.loads((DATA / name / "machine.json").read_text())
    nvml, root = recording["nvml"], root or DATA / name / "root"
    lines = [line.split() for line in (root / "proc/meminfo").read_text().splitlines()]
    kib = {line[0]: int(line[1]) for line in lines}
    values: dict[str, Any] = {
        "root": root,
        "memory": (kib["MemTotal:"] * 1024, kib["MemAvailable:"] * 1024),
        "nvml": None if nvml is None else RecordedNvml(nvml),
        "environ": recording["environ"],
        "machine": recording["machine"],
    }
    return Sources(**(values | changes))


def copied(name: str, directory: Path) -> Path:
    """A copy of a machine's files, to be changed by a test."""
    return Path(shutil.copytree(DATA / name / "root", directory / "root"))
