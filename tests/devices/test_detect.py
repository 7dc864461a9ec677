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


def facts(name: str, *fields: str) -> tuple[Any, ...]:
    device = detect(machine(name))
    return tuple(getattr(device, field) for field in fields)


def test_thor_is_found_with_shared_memory_from_meminfo() -> None:
    thor = detect(machine("thor"))
    assert (thor.kind, thor.name, thor.sm, thor.integrated) == (
        "cuda", "NVIDIA Thor", "sm_110", True,
    )  # fmt: skip
    assert thor.memory_total_bytes == 128766976 * 1024
    assert thor.memory_available_bytes == 120213504 * 1024
    assert thor.memory_bandwidth_bytes_s == 273e9
    assert thor.power_mode == "120W"
    assert thor.clocks == {"gpu": (315, 1575), "cpu": (972, 2601)}
    assert thor.jetson_model == "NVIDIA Jetson AGX Thor Developer Kit"
    assert thor.cpu_name == "Arm Neoverse-V3AE"
    assert thor.cpu_isa >= {"neon", "sve", "sve2", "bf16"}
    assert (thor.driver, thor.cuda, thor.nvml_error) == ("580.00", "13.0", None)
    assert thor.assumed == ()


def test_orin_is_found_though_nvml_gives_only_a_name() -> None:
    orin = detect(machine("orin"))
    assert (orin.kind, orin.sm, orin.integrated) == ("cuda", "sm_87", True)
    assert orin.known_as == "orin"
    assert orin.memory_bandwidth_bytes_s == 204.8e9
    assert orin.fp8_flops is None
    assert orin.power_mode == "MAXN"  # from the status file: nvpmodel is not on PATH there
    assert orin.clocks["gpu"] == (306, 1300)
    assert "sve" not in orin.cpu_isa


def test_orin_with_half_the_memory_is_another_module(tmp_path: Path) -> None:
    root = copied("orin", tmp_path)
    meminfo = root / "proc/meminfo"
    meminfo.write_text("MemTotal: 31457280 kB\nMemAvailable: 20000000 kB\n")
    orin = detect(machine("orin", root))
    assert (orin.known_as, orin.bf16_flops) == ("orin-32", None)


def test_rtx_5080_is_found_with_memory_of_its_own() -> None:
    card = detect(machine("rtx5080"))
    assert (card.kind, card.compute_capability, card.integrated) == ("cuda", "12.0", False)
    assert (card.memory_total_bytes, card.memory_available_bytes) == (17094934528, 16500000000)
    assert card.memory_bandwidth_bytes_s == 960e9
    assert card.power_limit_w == (360.0, 360.0)
    assert card.clocks == {"gpu": (2790, 3090), "memory": (15001, 15001), "cpu": (4300, 5270)}
    assert card.cpu_isa >= {"avx512f", "avx512_bf16"}
    assert card.power_mode is None


def test_spark_is_integrated_and_reads_its_memory_from_meminfo() -> None:
    spark = detect(machine("spark"))
    assert (spark.sm, spark.integrated, spark.jetson_model) == ("sm_121", True, None)
    assert spark.memory_total_bytes == 127600748 * 1024
    assert (spark.bf16_flops, spark.fp4_flops) == (None, 500e12)
    assert spark.cpu_name == "Arm Cortex-A725 + Arm Cortex-X925"


def test_the_gpu_that_cuda_would_use_is_described() -> None:
    h100 = detect(machine("h100"))  # CUDA_VISIBLE_DEVICES=1 beside an L4
    assert (h100.known_as, h100.gpu_index, h100.gpu_count) == ("h100", 1, 2)
    assert h100.cpu_isa >= {"amx_bf16", "amx_tile"}
    first = detect(machine("h100", environ={}))
    assert first.name == "NVIDIA L4"
    for uuid in ("GPU-9a7be2f4-0000-4000-8000-000000000100", "GPU-9a7b"):
        chosen = detect(machine("h100", environ={"CUDA_VISIBLE_DEVICES": uuid}))
        assert chosen.known_as == "h100"


@pytest.mark.parametrize("hidden", ["", "-1", "none", "NoDevFiles", "7", "GPU-0000"])
def test_a_gpu_hidden_from_cuda_is_not_used(hidden: str) -> None:
    device = detect(machine("rtx5080", environ={"CUDA_VISIBLE_DEVICES": hidden}))
    assert (device.kind, device.name) == ("cpu", "AMD Ryzen 7 9800X3D 8-Core Processor")


def test_wsl_laptop_does_not_get_the_desktop_cards_figures() -> None:
    laptop = detect(machine("wsl"))
    assert laptop.is_wsl
    assert (laptop.known_as, laptop.memory_bandwidth_bytes_s) == (None, None)
    assert (laptop.integrated, laptop.power_limit_w) == (False, None)


def test_container_without_nvml_takes_published_figures_and_says_so() -> None:
    card = detect(machine("container_no_nvml"))
    assert (card.kind, card.name, card.sm) == ("cuda", "NVIDIA GeForce RTX 5080", "sm_120")
    assert card.memory_total_bytes == 16 << 30
    assert card.memory_available_bytes is None
    assert card.assumed == ("compute_capability", "memory_total_bytes")
    assert (card.driver, card.in_container) == ("580.95.05", True)


def test_container_without_a_gpu_has_its_own_memory_limit(tmp_path: Path) -> None:
    root = copied("container_no_nvml", tmp_path)
    (root / "dev/nvidia0").unlink()
    box = detect(machine("container_no_nvml", root))
    assert (box.kind, box.memory_total_bytes, box.memory_available_bytes) == (
        "cpu", 16 << 30, 12 << 30,
    )  # fmt: skip


def test_plain_cpu_box_is_a_cpu() -> None:
    box = detect(machine("cpu"))
    assert (box.kind, box.compute_capability, box.integrated) == ("cpu", None, None)
    assert box.cpu_isa == {"avx", "avx2", "f16c", "fma"}
    assert (box.cpu_count, box.cpu_governor) == (8, "powersave")
    assert box.memory_bandwidth_bytes_s is None


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


@pytest.mark.parametrize("name", MACHINES)
def test_nvml_is_closed_again(name: str) -> None:
    sources = machine(name)
    detect(sources)
    assert sources.nvml is None or sources.nvml.open == 0


@pytest.mark.parametrize("name", MACHINES)
def test_description_is_json(name: str) -> None:
    plain = detect(machine(name)).as_dict()
    assert json.loads(json.dumps(plain)) == plain


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
