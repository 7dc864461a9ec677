"""Recorded machines as sources, and a stand-in for NVML that answers from a recording."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml

from molmo_edge.devices.sources import Sources

DATA = Path(__file__).parents[1] / "data" / "devices"
MACHINES = sorted(path.parent.name for path in DATA.glob("*/machine.json"))


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

    def nvmlDeviceGetCount(self) -> int:
        return len(self.recording["devices"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return dict(self.recording["devices"][index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:
        for device in self.recording["devices"]:
            if device.get("uuid") == uuid:
                return dict(device)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlSystemGetDriverVersion(self) -> str:
        return str(self.recording["driver"])

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return int(self.recording["cuda"])

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> str:
        return str(_given(handle, "name"))

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> str:
        return str(_given(handle, "uuid"))

    def nvmlDeviceGetCudaComputeCapability(self, handle: dict[str, Any]) -> list[int]:
        return list(_given(handle, "capability"))

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(**_given(handle, "memory"))

    def nvmlDeviceGetClockInfo(self, handle: dict[str, Any], kind: int) -> int:
        return int(_given(_given(handle, "clocks"), str(kind))[0])

    def nvmlDeviceGetMaxClockInfo(self, handle: dict[str, Any], kind: int) -> int:
        return int(_given(_given(handle, "clocks"), str(kind))[1])

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: dict[str, Any]) -> int:
        return int(_given(handle, "limits_mw")[0])

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: dict[str, Any]) -> int:
        return int(_given(handle, "limits_mw")[1])

    def nvmlDeviceGetPowerUsage(self, handle: dict[str, Any]) -> int:
        return int(_given(handle, "power_mw"))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: dict[str, Any]) -> int:
        return int(_given(handle, "energy_mj"))

    def nvmlDeviceGetTemperature(self, handle: dict[str, Any], sensor: int) -> int:
        return int(_given(handle, "temperature"))

    def nvmlDeviceGetUtilizationRates(self, handle: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(gpu=_given(handle, "utilisation"), memory=0)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: dict[str, Any]) -> int:
        return int(_given(handle, "clocks_event_reasons"))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: dict[str, Any]) -> int:
        return int(_given(handle, "clocks_throttle_reasons"))


def _given(values: dict[str, Any], key: str) -> Any:
    if key not in values:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return values[key]


def machine(name: str, root: Path | None = None, **changes: Any) -> Sources:
    """A recorded machine; ``root`` replaces its files, ``changes`` its sources."""
    recording = json.loads((DATA / name / "machine.json").read_text())
    answers: dict[str, str] = recording["run"]

    def run(command: Sequence[str]) -> str | None:
        return answers.get(" ".join(command))

    nvml, root = recording["nvml"], root or DATA / name / "root"
    meminfo = root / "proc/meminfo"

    def memory() -> tuple[int, int] | None:
        kib = dict(line.split(":") for line in meminfo.read_text().splitlines())
        total, available = (int(kib[k].split()[0]) for k in ("MemTotal", "MemAvailable"))
        return total * 1024, available * 1024

    values: dict[str, Any] = {
        "root": root,
        "memory": memory,
        "nvml": None if nvml is None else RecordedNvml(nvml),
        "run": run,
        "environ": recording["environ"],
        "machine": recording["machine"],
    }
    return Sources(**(values | changes))


def copied(name: str, folder: Path) -> Path:
    """A copy of a machine's files, to be changed by a test."""
    return Path(shutil.copytree(DATA / name / "root", folder / "root"))
