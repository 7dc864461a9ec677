"""Published figures of GPUs: memory size and bandwidth, with the source of each row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from molmo_edge.errors import ConfigError, did_you_mean

GIB = 1 << 30


@dataclass(frozen=True)
class Spec:
    """One GPU's published figures."""

    key: str  # the name `known_device` takes
    name: str  # as NVML reports it, or the board's name for a Jetson
    capability: str
    integrated: bool  # whether GPU and CPU share their memory
    memory_gib: float  # nominal
    bandwidth_gb_s: float  # 10^9 bytes per second
    source: str
    # Of part of a Jetson's names: NVML's, and the device tree's model and compatible strings.
    jetson: str = ""


_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix tables"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix tables"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper, table 9"
_THOR = "NVIDIA Jetson Thor series datasheet"
_ORIN = "NVIDIA Jetson modules comparison"
_NANO = "NVIDIA Jetson modules comparison; 102 GB/s is the Super mode, 68 GB/s before it"

# Jetson modules that share a pattern differ in memory size alone, which the machine itself tells.
SPECS: tuple[Spec, ...] = (
    Spec("thor", "NVIDIA Jetson AGX Thor (T5000)", "11.0", True, 128, 273, _THOR,
         jetson=r"p3834|tegra264|NVIDIA Thor"),
    Spec("thor-t4000", "NVIDIA Jetson T4000", "11.0", True, 64, 273, _THOR,
         jetson=r"p3834|tegra264|NVIDIA Thor"),
    Spec("orin", "NVIDIA Jetson AGX Orin 64GB", "8.7", True, 64, 204.8, _ORIN,
         jetson=r"AGX Orin|p3701"),
    Spec("orin-32", "NVIDIA Jetson AGX Orin 32GB", "8.7", True, 32, 204.8, _ORIN,
         jetson=r"AGX Orin|p3701"),
    Spec("orin-nx", "NVIDIA Jetson Orin NX 16GB", "8.7", True, 16, 102.4, _ORIN,
         jetson=r"p3767-000[01]|Orin NX"),
    Spec("orin-nano", "NVIDIA Jetson Orin Nano 8GB", "8.7", True, 8, 102, _NANO,
         jetson=r"p3767-000[35]|Orin Nano"),
    Spec("spark", "NVIDIA GB10", "12.1", True, 128, 273, "NVIDIA DGX Spark datasheet"),
    Spec("rtx5090", "NVIDIA GeForce RTX 5090", "12.0", False, 32, 1792, _BLACKWELL),
    Spec("rtx5080", "NVIDIA GeForce RTX 5080", "12.0", False, 16, 960, _BLACKWELL),
    Spec("rtx5070ti", "NVIDIA GeForce RTX 5070 Ti", "12.0", False, 16, 896, _BLACKWELL),
    Spec("rtx4090", "NVIDIA GeForce RTX 4090", "8.9", False, 24, 1008, _ADA),
    Spec("rtx3090", "NVIDIA GeForce RTX 3090", "8.6", False, 24, 936, _GA102),
    Spec("l4", "NVIDIA L4", "8.9", False, 24, 300, "NVIDIA L4 datasheet"),
    Spec("l40s", "NVIDIA L40S", "8.9", False, 48, 864, "NVIDIA L40S datasheet"),
    Spec("a100", "NVIDIA A100-SXM4-80GB", "8.0", False, 80, 2039, "NVIDIA A100 datasheet"),
    Spec("h100", "NVIDIA H100 80GB HBM3", "9.0", False, 80, 3350, "NVIDIA H100 datasheet (SXM)"),
    Spec("h100-pcie", "NVIDIA H100 PCIe", "9.0", False, 80, 2000, "NVIDIA H100 PCIe datasheet"),
    Spec("h200", "NVIDIA H200", "9.0", False, 141, 4800, "NVIDIA H200 datasheet (SXM)"),
)  # fmt: skip


def find_spec(name: str, board: str) -> Spec | None:
    """Figures of a GPU; ``None`` for an unknown one, such as a laptop or MIG variant.

    ``name`` is NVML's; older drivers leave out "NVIDIA". ``board`` has a Jetson's model and device
    tree names; its containers may hide both.
    """
    for spec in SPECS:
        if name.removeprefix("NVIDIA ") == spec.name.removeprefix("NVIDIA "):
            return spec
        if spec.jetson and re.search(spec.jetson, f"{name} {board}"):
            return spec
    return None


def spec_named(key: str) -> Spec:
    """The row of a name. Raises ConfigError, which suggests the nearest and lists all."""
    rows = {spec.key: spec for spec in SPECS}
    wanted = key.strip().lower()
    if wanted in rows:
        return rows[wanted]
    hint = did_you_mean(wanted, rows)
    raise ConfigError(f"Unknown device {key!r}.{hint} Known are {', '.join(rows)}.")
