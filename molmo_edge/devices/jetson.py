"""What only a Jetson tells: its device tree, power mode, devfreq clocks and power rails.

Everything here works without root. ``jetson_clocks --show`` and the memory clock in debugfs need
root, so the memory clock is read where debugfs is readable and is unknown elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.devices.sources import Sources

# SoC of the device tree → compute capability of its GPU (NVIDIA's CUDA GPU list).
CAPABILITY = {"tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}

# devfreq nodes of the graphics clusters: nvgpu up to Orin, nvidia.ko from Thor on.
_GPU_NODES = re.compile(r"gpu-gpc-\d+|.*\.(gpu|ga10b|gv11b|gp10b)")
_DEVICE_NODES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/nvhost-ctrl-gpu")


@dataclass(frozen=True)
class Jetson:
    """A Jetson as its device tree describes it.

    Attributes:
        model: board name, such as "NVIDIA Jetson AGX Thor Developer Kit".
        compatible: the device tree's list, module (p3834 …) and SoC (tegra264 …) among it.
        soc: "tegra264" and so on.
    """

    model: str
    compatible: tuple[str, ...]
    soc: str

    @property
    def capability(self) -> str | None:
        return CAPABILITY.get(self.soc)


def jetson(sources: Sources) -> Jetson | None:
    """The Jetson this runs on, or ``None``."""
    raw = sources.read("/proc/device-tree/compatible")
    raw = raw or sources.read("/sys/firmware/devicetree/base/compatible")
    if raw is None:
        return None
    compatible = tuple(part for part in raw.split("\0") if part)
    soc = next((m[1] for c in compatible if (m := re.search(r"nvidia,(tegra\d+)$", c))), None)
    if soc is None:
        return None
    model = sources.read("/proc/device-tree/model")
    model = model or sources.read("/sys/firmware/devicetree/base/model")
    return Jetson(model or f"NVIDIA Jetson ({soc})", compatible, soc)


def gpu_present(sources: Sources) -> bool:
    """Whether this process has been given the GPU's device nodes."""
    return any(sources.exists(node) for node in _DEVICE_NODES)


def power_mode(sources: Sources) -> str | None:
    """Name of the nvpmodel mode, such as "MAXN" or "120W"."""
    answer = sources.run(["nvpmodel", "-q"]) or ""
    if found := re.search(r"NV Power Mode:\s*(\S+)", answer):
        return found[1]
    status = re.search(r"pmode:(\d+)", sources.read("/var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    config = sources.read("/etc/nvpmodel.conf") or ""
    for number, name in re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", config):
        if int(number) == int(status[1]):
            return str(name)
    return f"mode {int(status[1])}"


def gpu_devfreq(sources: Sources) -> Path | None:
    """sysfs folder of the graphics clusters' clock."""
    for entry in sources.entries("/sys/class/devfreq"):
        if _GPU_NODES.fullmatch(entry.name):
            return entry
    return None


def clock(
    sources: Sources, folder: Path, current: str, maximum: str
) -> tuple[int | None, int | None] | None:
    """Current and maximum in MHz of a sysfs clock given in Hz."""
    values = [sources.read_int(folder / name) for name in (current, maximum)]
    if values == [None, None]:
        return None
    now, top = (None if value is None else round(value / 1e6) for value in values)
    return now, top


def clocks(sources: Sources) -> dict[str, tuple[int | None, int | None]]:
    """Clocks by name ("gpu", "memory") as (current, maximum) in MHz, those that are readable."""
    found = {}
    node = gpu_devfreq(sources)
    gpu = None if node is None else clock(sources, node, "cur_freq", "max_freq")
    emc = clock(sources, sources.path("/sys/kernel/debug/bpmp/debug/clk/emc"), "rate", "max_rate")
    if gpu is not None:
        found["gpu"] = gpu
    if emc is not None:
        found["memory"] = emc
    return found


@dataclass(frozen=True)
class Rail:
    """One measured supply: power where the chip gives it, else the product of volts and amperes."""

    name: str
    chip: str
    power_uw: Path | None
    millivolt: Path | None
    milliamp: Path | None

    def watts(self, sources: Sources) -> float | None:
        if self.power_uw is not None:
            microwatts = sources.read_int(self.power_uw)
            return None if microwatts is None else microwatts / 1e6
        if self.millivolt is None or self.milliamp is None:
            return None
        volts, amps = sources.read_int(self.millivolt), sources.read_int(self.milliamp)
        return None if volts is None or amps is None else volts * amps / 1e6


def rails(sources: Sources) -> list[Rail]:
    """Power rails of the board's INA3221 and INA238 monitors."""
    found = []
    for chip in sources.entries("/sys/class/hwmon"):
        name = sources.read(chip / "name")
        if name == "ina238":
            label = sources.read(chip / "in1_label") or "VIN"
            found.append(Rail(label, name, chip / "power1_input", None, None))
        elif name == "ina3221":
            for channel in (1, 2, 3):
                supply = sources.read(chip / f"in{channel}_label")
                if supply and supply != "NC" and "sum of" not in supply.lower():
                    volts, amps = chip / f"in{channel}_input", chip / f"curr{channel}_input"
                    found.append(Rail(supply, name, None, volts, amps))
    return found
