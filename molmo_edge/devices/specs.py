"""Published figures of GPUs: memory size and bandwidth, dense matrix throughput.

Every row names its source. FLOP/s are dense (vendors print twice as much for 2:4 sparsity) with
FP32 accumulation, which vLLM's kernels use; on GeForce cards that is half of the figure with FP16
accumulation. What is not published is ``None``, never a guess.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from molmo_edge.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Spec:
    """One GPU's published figures."""

    key: str  # the name `known_device` takes
    name: str  # as NVML reports it, or the board's name for a Jetson
    # Of the whole name that NVML reports, or, for a Jetson, also of part of its device tree's
    # model and compatible strings.
    pattern: str
    capability: str
    integrated: bool  # whether GPU and CPU share their memory
    memory_gib: float  # nominal
    bandwidth_gb_s: float  # 10^9 bytes per second
    # 10^12 FLOP/s; None: not published, or the GPU has no such unit.
    bf16_tflops: float | None
    fp8_tflops: float | None
    fp4_tflops: float | None
    source: str

    @property
    def is_jetson(self) -> bool:
        return self.name.startswith("NVIDIA Jetson")


_RTX50 = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix tables"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix tables"
_THOR = "NVIDIA Jetson Thor series datasheet (sparse FP4 figure, halved for dense, then per doubling of width)"  # noqa: E501
_ORIN = "NVIDIA Jetson AGX Orin Series technical brief (GPU INT8 sparse figure ÷ 4)"
_MODULES = "NVIDIA Jetson modules comparison (memory); matrix figures not published for BF16"

# Jetson rows that share a pattern differ in memory, which then decides between them.
SPECS: tuple[Spec, ...] = (
    Spec("thor-t4000", "NVIDIA Jetson T4000", r"p3834|tegra264|NVIDIA Thor",
         "11.0", True, 64, 273, 150, 300, 600, _THOR),
    Spec("thor", "NVIDIA Jetson AGX Thor (T5000)", r"p3834|tegra264|NVIDIA Thor",
         "11.0", True, 128, 273, 258.75, 517.5, 1035, _THOR),
    Spec("orin-nano", "NVIDIA Jetson Orin Nano 8GB", r"p3767-000[35]|Orin Nano",
         "8.7", True, 8, 102, None, None, None,
         _MODULES + "; 102 GB/s is the Super mode, 68 GB/s before it"),
    Spec("orin-nx", "NVIDIA Jetson Orin NX 16GB", r"p3767-000[01]|Orin NX",
         "8.7", True, 16, 102.4, None, None, None, _MODULES),
    Spec("orin-32", "NVIDIA Jetson AGX Orin 32GB", r"AGX Orin|p3701",
         "8.7", True, 32, 204.8, None, None, None, _MODULES),
    Spec("orin", "NVIDIA Jetson AGX Orin 64GB", r"AGX Orin|p3701",
         "8.7", True, 64, 204.8, 42.5, None, None, _ORIN),
    Spec("spark", "NVIDIA GB10", r"(NVIDIA )?GB10",
         "12.1", True, 128, 273, None, None, 500,
         "NVIDIA DGX Spark datasheet (1 PFLOP sparse FP4, halved; no other is published)"),
    Spec("rtx5090", "NVIDIA GeForce RTX 5090", r"(NVIDIA )?GeForce RTX 5090( D)?",
         "12.0", False, 32, 1792, 209.5, 419, 1676, _RTX50),
    Spec("rtx5080", "NVIDIA GeForce RTX 5080", r"(NVIDIA )?GeForce RTX 5080",
         "12.0", False, 16, 960, 112.6, 225.1, 900.4, _RTX50),
    Spec("rtx5070ti", "NVIDIA GeForce RTX 5070 Ti", r"(NVIDIA )?GeForce RTX 5070 Ti",
         "12.0", False, 16, 896, 87.9, 175.8, 703, _RTX50),
    Spec("rtx4090", "NVIDIA GeForce RTX 4090", r"(NVIDIA )?GeForce RTX 4090",
         "8.9", False, 24, 1008, 165.2, 330.3, None, _ADA),
    Spec("rtx3090", "NVIDIA GeForce RTX 3090", r"(NVIDIA )?GeForce RTX 3090",
         "8.6", False, 24, 936, 71, None, None,
         "NVIDIA Ampere GA102 GPU Architecture whitepaper, table 9"),
    Spec("l4", "NVIDIA L4", r"(NVIDIA )?L4",
         "8.9", False, 24, 300, 121, 242.5, None, "NVIDIA L4 datasheet (sparse figures halved)"),
    Spec("l40s", "NVIDIA L40S", r"(NVIDIA )?L40S",
         "8.9", False, 48, 864, 362.05, 733, None, "NVIDIA L40S datasheet"),
    Spec("a100", "NVIDIA A100-SXM4-80GB", r"(NVIDIA )?A100-SXM4-80GB",
         "8.0", False, 80, 2039, 312, None, None, "NVIDIA A100 datasheet"),
    Spec("h100", "NVIDIA H100 80GB HBM3", r"(NVIDIA )?H100 80GB HBM3",
         "9.0", False, 80, 3350, 989.5, 1979, None, "NVIDIA H100 datasheet (SXM, sparse halved)"),
    Spec("h100-pcie", "NVIDIA H100 PCIe", r"(NVIDIA )?H100 PCIe",
         "9.0", False, 80, 2000, 756, 1513, None, "NVIDIA H100 PCIe datasheet (sparse halved)"),
    Spec("h200", "NVIDIA H200", r"(NVIDIA )?H200",
         "9.0", False, 141, 4800, 989.5, 1979, None, "NVIDIA H200 datasheet (SXM, sparse halved)"),
)  # fmt: skip


def find_spec(name: str, board: str, memory_bytes: int | None) -> Spec | None:
    """Figures of a GPU; ``None`` for an unknown one, such as a laptop or MIG variant.

    Args:
        name: as NVML reports it.
        board: a Jetson's model and device tree names; its containers may hide both.
        memory_bytes: decides between Jetson modules that share a pattern.
    """
    matches = [
        spec
        for spec in SPECS
        if re.fullmatch(spec.pattern, name) or (spec.is_jetson and re.search(spec.pattern, board))
    ]
    if len(matches) > 1 and memory_bytes is not None:
        return min(matches, key=lambda spec: abs(spec.memory_gib - memory_bytes / GIB))
    return matches[0] if len(matches) == 1 else None


def spec_named(key: str) -> Spec:
    """The row of a name.

    Raises:
        ConfigError: no such row; the message suggests the nearest and lists all.
    """
    rows = {spec.key: spec for spec in SPECS}
    wanted = key.strip().lower()
    if wanted in rows:
        return rows[wanted]
    near = difflib.get_close_matches(wanted, rows, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown device {key!r}: {hint}known devices are {', '.join(rows)}")
