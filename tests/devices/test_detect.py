"""Detection describes each recorded machine, and no broken source stops it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_edge.devices.detect import detect, known_device, known_devices
from molmo_edge.devices.sources import Sources
from molmo_edge.devices.specs import SPECS
from molmo_edge.errors import ConfigError
from tests.devices.recorded import MACHINES, RecordedNvml, copied, machine

EXPECTED: dict[str, dict[str, Any]] = {
    "thor": {
        "kind": "cuda", "name": "NVIDIA Thor", "sm": "sm_110", "integrated": True,
        "memory_total_bytes": 128766976 * 1024, "memory_available_bytes": 120213504 * 1024,
        "memory_bandwidth_bytes_s": 273e9, "power_mode": "120W", "assumed": (),
        "clocks": {"gpu": (315, 1575), "cpu": (972, 2601)}, "cpu_name": "Arm Neoverse-V3AE",
        "jetson_model": "NVIDIA Jetson AGX Thor Developer Kit",
        "cpu_isa": {"neon", "fp16", "dotprod", "sve", "sve2", "bf16", "i8mm"},
        "driver": "580.00", "cuda": "13.0", "nvml_error": None,
    },
    "orin": {  # NVML gives only a name, and nvpmodel is not on PATH
        "kind": "cuda", "sm": "sm_87", "integrated": True, "known_as": "orin",
        "memory_bandwidth_bytes_s": 204.8e9, "fp8_flops": None, "power_mode": "MAXN",
        "clocks": {"gpu": (306, 1300), "cpu": (730, 2202)},
        "cpu_isa": {"neon", "fp16", "dotprod"},
    },
    "rtx5080": {
        "kind": "cuda", "compute_capability": "12.0", "integrated": False, "power_mode": None,
        "memory_total_bytes": 17094934528, "memory_available_bytes": 16500000000,
        "memory_bandwidth_bytes_s": 960e9, "power_limit_w": (360.0, 360.0),
        "clocks": {"gpu": (2790, 3090), "memory": (15001, 15001), "cpu": (4300, 5270)},
    },
    "spark": {
        "sm": "sm_121", "integrated": True, "jetson_model": None, "bf16_flops": None,
        "memory_total_bytes": 127600748 * 1024, "fp4_flops": 500e12,
        "cpu_name": "Arm Cortex-A725 + Arm Cortex-X925",
    },
    "h100": {  # CUDA_VISIBLE_DEVICES=1 beside an L4
        "known_as": "h100", "gpu_index": 1, "gpu_count": 2,
    },
    "wsl": {  # a laptop, which does not get the desktop card's figures
        "is_wsl": True, "known_as": None, "memory_bandwidth_bytes_s": None, "integrated": False,
        "power_limit_w": None,
    },
    "container_no_nvml": {  # published figures, named as such
        "kind": "cuda", "name": "NVIDIA GeForce RTX 5080", "sm": "sm_120", "driver": "580.95.05",
        "memory_total_bytes": 16 << 30, "memory_available_bytes": None, "in_container": True,
        "assumed": ("compute_capability", "memory_total_bytes"),
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


def test_orin_with_half_the_memory_is_another_module(tmp_path: Path) -> None:
    root = copied("orin", tmp_path)
    meminfo = root / "proc/meminfo"
    meminfo.write_text("MemTotal: 31457280 kB\nMemAvailable: 20000000 kB\n")
    orin = detect(machine("orin", root))
    assert (orin.known_as, orin.bf16_flops) == ("orin-32", None)


def test_instruction_sets_of_x86_are_read() -> None:
    assert detect(machine("rtx5080")).cpu_isa >= {"avx512f", "avx512_bf16"}
    assert detect(machine("h100")).cpu_isa >= {"amx_bf16", "amx_tile"}


def test_the_gpu_that_cuda_would_use_is_described() -> None:
    first = detect(machine("h100", environ={}))
    assert first.name == "NVIDIA L4"
    for uuid in ("GPU-9a7be2f4-0000-4000-8000-000000000100", "GPU-9a7b"):
        chosen = detect(machine("h100", environ={"CUDA_VISIBLE_DEVICES": uuid}))
        assert chosen.known_as == "h100"


@pytest.mark.parametrize("hidden", ["", "-1", "none", "NoDevFiles", "7", "GPU-0000"])
def test_a_gpu_hidden_from_cuda_is_not_used(hidden: str) -> None:
    device = detect(machine("rtx5080", environ={"CUDA_VISIBLE_DEVICES": hidden}))
    assert (device.kind, device.name) == ("cpu", "AMD Ryzen 7 9800X3D 8-Core Processor")


def test_container_without_a_gpu_has_its_own_memory_limit(tmp_path: Path) -> None:
    root = copied("container_no_nvml", tmp_path)
    (root / "dev/nvidia0").unlink()
    box = detect(machine("container_no_nvml", root))
    assert (box.kind, box.memory_total_bytes, box.memory_available_bytes) == (
        "cpu", 16 << 30, 12 << 30,
    )  # fmt: skip


def test_jetson_container_without_its_gpu_is_a_cpu(tmp_path: Path) -> None:
    root = copied("thor", tmp_path)
    (root / "dev/nvidia0").unlink()
    device = detect(machine("thor", root, nvml=None))
    assert (device.kind, device.jetson_model) == ("cpu", "NVIDIA Jetson AGX Thor Developer Kit")


def test_nvml_that_fails_is_reported_and_the_rest_still_found() -> None:
    broken = RecordedNvml({"error": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "devices": []})
    thor = detect(machine("thor", nvml=broken))
    assert thor.nvml_error == "RM has detected an NVML/RM version mismatch."
    assert (thor.kind, thor.sm, thor.name) == (
        "cuda", "sm_110", "NVIDIA Jetson AGX Thor Developer Kit",
    )  # fmt: skip
    absent = RecordedNvml({"error": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "devices": []})
    assert detect(machine("cpu", nvml=absent)).nvml_error is None


class Hostile:
    """NVML whose functions return nonsense of every type."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __getattr__(self, name: str) -> Any:
        def call(*_args: Any) -> Any:
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

        return call


@pytest.mark.parametrize(
    "answer", [None, "", "x", -1, 0, 3, 1.5, b"\xff", [], {}, True, RuntimeError("no"), OSError()]
)
@pytest.mark.parametrize("name", ["thor", "rtx5080", "cpu"])
def test_nonsense_from_nvml_never_stops_detection(name: str, answer: Any) -> None:
    assert detect(machine(name, nvml=Hostile(answer))).kind in ("cuda", "cpu")


def test_an_empty_or_missing_root_is_a_cpu(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        device = detect(Sources(root=root))
        assert (device.kind, device.name, device.memory_total_bytes) == ("cpu", "CPU", None)


FILES = (
    "proc/cpuinfo", "proc/meminfo", "proc/device-tree/compatible", "proc/device-tree/model",
    "sys/class/devfreq/gpu-gpc-0/cur_freq", "sys/fs/cgroup/memory.max", "var/lib/nvpmodel/status",
    "sys/class/hwmon/hwmon4/name", "etc/nvpmodel.conf", "proc/driver/nvidia/version",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(FILES), st.one_of(st.binary(max_size=80), st.none())))
@settings(deadline=None, max_examples=60)
def test_unreadable_and_garbled_files_never_stop_detection(
    tmp_path_factory: pytest.TempPathFactory, broken: dict[str, bytes | None]
) -> None:
    root = tmp_path_factory.mktemp("root")
    for name, content in broken.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)  # reading it fails, as an unreadable file does
        else:
            path.write_bytes(content)
    device = detect(Sources(root=root, environ={"PATH": "\0:/"}))
    assert device.kind == "cpu"


def test_this_machine_is_described_without_torch_or_vllm() -> None:
    code = (
        "import sys; from molmo_edge.devices import detect, doctor, plan, telemetry;"
        "d = detect.detect(); assert d.kind in ('cuda', 'cpu') and d.memory_total_bytes > 0;"
        "print([m for m in ('torch', 'vllm', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", known_devices())
def test_known_devices_have_cited_figures(name: str) -> None:
    device = known_device(name)
    assert device.known_as == name
    assert device.memory_bandwidth_bytes_s and device.memory_total_bytes
    assert device.figures_source
    assert device.memory_available_bytes is None  # nobody knows
    peaks = [p for p in (device.bf16_flops, device.fp8_flops, device.fp4_flops) if p is not None]
    assert peaks == sorted(peaks)  # fewer bits are never slower
    assert len(set(peaks)) == len(peaks)


def test_every_name_nvml_gives_finds_its_own_row() -> None:
    for spec in SPECS:
        if not spec.name.startswith("NVIDIA Jetson"):
            nvml = RecordedNvml({"driver": "1", "cuda": 13000, "devices": [{"name": spec.name}]})
            assert detect(Sources(root=Path("/nowhere"), nvml=nvml)).known_as == spec.key


def test_unknown_device_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'rtx5080'.*thor.*h200"):
        known_device("rtx508O")
