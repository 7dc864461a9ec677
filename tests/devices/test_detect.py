"""Detection describes each recorded machine, and no broken source stops it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pynvml
import pytest

from molmo_edge.devices.detect import detect, known_device
from molmo_edge.devices.sources import Sources
from molmo_edge.devices.specs import SPECS, Spec
from molmo_edge.errors import ConfigError
from tests.devices.recorded import MACHINES, RecordedNvml, copied, machine

EXPECTED: dict[str, dict[str, Any]] = {
    "thor": {
        "kind": "cuda", "name": "NVIDIA Thor", "sm": "sm_110", "integrated": True,
        "memory_total_bytes": 128766976 * 1024, "memory_available_bytes": 120213504 * 1024,
        "memory_bandwidth_bytes_s": 273e9, "power_mode": "120W",
        "clocks": {"gpu": (315, 1575), "cpu": (972, 2601)},
        "jetson_model": "NVIDIA Jetson AGX Thor Developer Kit",
        "cpu_isa": {"asimd", "asimdhp", "asimddp", "sve", "sve2", "bf16", "i8mm"},
        "driver": "580.00", "cuda": "13.0", "nvml_error": None,
    },
    "orin": {  # NVML gives only a name
        "kind": "cuda", "sm": "sm_87", "integrated": True,
        "memory_bandwidth_bytes_s": 204.8e9, "power_mode": "MAXN",
        "clocks": {"gpu": (306, 1300), "cpu": (730, 2202)},
        "cpu_isa": {"asimd", "asimdhp", "asimddp"},
    },
    "rtx5080": {
        "kind": "cuda", "compute_capability": "12.0", "integrated": False, "power_mode": None,
        "memory_total_bytes": 17094934528, "memory_available_bytes": 16500000000,
        "memory_bandwidth_bytes_s": 960e9, "power_limit_w": 360.0,
        "clocks": {"gpu": (2790, 3090), "memory": (15001, 15001), "cpu": (4300, 5270)},
    },
    "spark": {
        "sm": "sm_121", "integrated": True, "jetson_model": None,
        "memory_total_bytes": 127600748 * 1024, "memory_bandwidth_bytes_s": 273e9,
    },
    "h100": {"memory_bandwidth_bytes_s": 3350e9},  # CUDA_VISIBLE_DEVICES=1 beside an L4
    "wsl": {  # a laptop, which does not get the desktop card's figures
        "memory_bandwidth_bytes_s": None, "integrated": False, "power_limit_w": None,
    },
    "container_no_nvml": {  # vLLM finds no GPU without NVML, and the container limits memory
        "kind": "cpu", "in_container": True,
        "memory_total_bytes": 16 << 30, "memory_available_bytes": 12 << 30,
    },
    "cpu": {
        "kind": "cpu", "compute_capability": None, "integrated": None, "cpu_count": 8,
        "cpu_isa": {"avx", "avx2", "f16c", "fma"}, "cpu_governor": "powersave",
        "memory_bandwidth_bytes_s": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_each_recorded_machine_is_described(name: str) -> None:
    sources = machine(name)
    device = detect(sources)
    assert {field: getattr(device, field) for field in EXPECTED[name]} == EXPECTED[name]
    assert json.loads(json.dumps(device.as_dict())) == device.as_dict()
    assert sources.nvml is None or sources.nvml.open == 0  # closed again


def test_a_thor_container_that_hides_the_device_tree_keeps_its_figures(tmp_path: Path) -> None:
    root = copied("thor", tmp_path)
    (root / "proc/device-tree/compatible").unlink()
    thor = detect(machine("thor", root))
    assert (thor.integrated, thor.jetson_model) == (True, None)
    assert (thor.memory_total_bytes, thor.memory_bandwidth_bytes_s) == (128766976 * 1024, 273e9)


def test_the_gpu_that_cuda_would_use_is_described() -> None:
    assert detect(machine("h100", environ={})).name == "NVIDIA L4"
    uuid = "GPU-9a7be2f4-0000-4000-8000-000000000100"
    h100 = detect(machine("h100", environ={"CUDA_VISIBLE_DEVICES": uuid}))
    assert h100.name == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles", "7", "GPU-0000"])
def test_a_gpu_hidden_from_cuda_is_not_used(hidden: str) -> None:
    device = detect(machine("rtx5080", environ={"CUDA_VISIBLE_DEVICES": hidden}))
    assert (device.kind, device.name) == ("cpu", "AMD Ryzen 7 9800X3D 8-Core Processor")
    assert device.nvml_error is None


def test_nvml_that_fails_is_reported_and_the_rest_still_found() -> None:
    broken = RecordedNvml({"error": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH})
    thor = detect(machine("thor", nvml=broken))
    assert thor.nvml_error == "RM has detected an NVML/RM version mismatch."
    assert (thor.kind, thor.sm, thor.name) == (
        "cuda", "sm_110", "NVIDIA Jetson AGX Thor Developer Kit",
    )  # fmt: skip
    absent = RecordedNvml({"error": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND})
    assert detect(machine("cpu", nvml=absent)).nvml_error is None


def test_missing_and_garbled_files_never_stop_detection(tmp_path: Path) -> None:
    for name in ("proc/cpuinfo", "proc/device-tree/compatible", "sys/fs/cgroup/memory.max"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff\0: nonsense\n::")
    (tmp_path / "var/lib/nvpmodel/status").mkdir(parents=True)  # cannot be read as a file
    for root in (tmp_path, tmp_path / "missing"):
        device = detect(Sources(root=root))
        assert (device.kind, device.name, device.memory_total_bytes) == ("cpu", "CPU", None)


def test_this_machine_is_described_without_torch_or_vllm() -> None:
    code = (
        "import sys; from molmo_edge.devices import detect, plan, telemetry;"
        "from molmo_edge.engine import doctor;"
        "d = detect.detect(); assert d.kind in ('cuda', 'cpu') and d.memory_total_bytes > 0;"
        "assert doctor.diagnose().findings;"
        "print([m for m in ('torch', 'vllm', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.key)
def test_known_devices_have_cited_figures(spec: Spec) -> None:
    device = known_device(spec.key)
    assert device.memory_bandwidth_bytes_s and device.memory_total_bytes
    assert device.bandwidth_source and device.memory_available_bytes is None
    if not spec.jetson:
        nvml = RecordedNvml({"driver": "1", "cuda": 13000, "devices": [{"name": spec.name}]})
        detected = detect(Sources(root=Path("/nowhere"), nvml=nvml))
        assert detected.memory_bandwidth_bytes_s == device.memory_bandwidth_bytes_s


def test_unknown_device_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean rtx5080.*thor.*h200"):
        known_device("rtx508O")
