"""Every recorded machine gets its profile, and profiles hold nothing that vLLM does not know."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.devices import profiles
from molmo_edge.devices.detect import DeviceInfo, detect, known_device
from molmo_edge.devices.precision import check_kv_cache_dtype
from molmo_edge.devices.profiles import load_profile, profile_names, profile_warning, select_profile
from molmo_edge.devices.specs import SPECS
from molmo_edge.engine.vllm_args import engine_environment
from molmo_edge.errors import ConfigError
from molmo_edge.settings import EdgeSettings
from tests.devices.recorded import machine

DIRECTORY = Path(profiles.__file__).with_name("profiles")


@pytest.mark.parametrize(
    ("name", "profile"),
    [("thor", "thor"), ("orin", "orin"), ("rtx5080", "rtx5080"), ("spark", "spark"),
     ("h100", "cuda"), ("wsl", "cuda"), ("cpu", "cpu")],
)  # fmt: skip
def test_each_recorded_machine_gets_its_profile(name: str, profile: str) -> None:
    device = detect(machine(name))
    chosen, reason = select_profile(device)
    assert chosen.name == profile
    assert profile_warning(chosen, device) is None
    traits = device.summary if device.kind == "cuda" else "no usable NVIDIA GPU"
    assert reason == f"{profile}: {traits}"


def test_size_decides_among_cards_of_one_capability() -> None:
    assert select_profile(known_device("rtx5090"))[0].name == "cuda"
    assert select_profile(known_device("rtx5070ti"))[0].name == "rtx5080"
    unknown = DeviceInfo(name="NVIDIA GPU", kind="cuda", compute_capability="12.0")
    assert select_profile(unknown)[0].name == "cuda"


def test_profile_for_another_device_is_noticed() -> None:
    assert profile_warning(load_profile("thor"), detect(machine("rtx5080"))) == (
        "profile thor is for another device: Jetson AGX Thor (sm_110, shared memory); "
        "rtx5080 would fit NVIDIA GeForce RTX 5080"
    )
    assert profile_warning(load_profile("thor"), detect(machine("cpu"))) is not None
    assert profile_warning(load_profile("rtx5080"), known_device("rtx5090")) is not None


@pytest.mark.parametrize(
    ("name", "near"), [("thro", "thor"), ("RTX5080", "rtx5080"), ("abacus", None)]
)
def test_unknown_profile_names_the_nearest_if_one_is_near(name: str, near: str | None) -> None:
    hint = f" Did you mean {near}?" if near else ""
    with pytest.raises(ConfigError, match=re.escape(f"{name}'.{hint} Profiles are cpu, cuda")):
        load_profile(name)


@pytest.mark.parametrize("name", profile_names())
def test_settings_accept_a_profile_that_fixes_shared_memory_and_graphs(name: str) -> None:
    profile = load_profile(name)
    assert EdgeSettings(**profile.as_settings()).max_num_seqs <= 16
    assert profile.match.keys() <= {"kind", "capability", "integrated", "memory_gb_max"}
    in_bytes = "kv_cache_memory_gb" in profile.settings
    assert in_bytes == (profile.match.get("integrated") is True or name == "cpu")
    # Graphs are captured up to the batch that happens.
    sizes = profile.engine_args.get("compilation_config", {}).get("cudagraph_capture_sizes")
    eager = profile.settings.get("enforce_eager")
    assert sizes is None if eager else max(sizes) == profile.settings["max_num_seqs"]


@pytest.mark.parametrize("name", profile_names())
def test_every_value_has_its_reason(name: str) -> None:
    lines = (DIRECTORY / f"{name}.toml").read_text().splitlines()
    chosen = lines[lines.index("[settings]") :]
    for above, line in pairwise(chosen):
        if re.match(r"\w+ =", line):
            assert above.startswith("#"), f"{line} has no comment above it"


@pytest.mark.parametrize("known", [spec.key for spec in SPECS])
def test_profile_asks_no_device_for_what_it_cannot_do(known: str) -> None:
    device = known_device(known)
    settings = select_profile(device)[0].settings
    check_kv_cache_dtype(settings["kv_cache_dtype"], device, settings.get("attention_backend"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_vllm_knows_every_name_a_profile_uses() -> None:
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    from vllm import envs
    from vllm.config import CompilationConfig
    from vllm.config.kernel import KernelConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    env = engine_environment(EdgeSettings(), known_device("thor"))
    assert {v for v in env if v.startswith("VLLM_")} <= set(envs.environment_variables)
    known: set[str] = set(arg_utils.EngineArgs.__dataclass_fields__)
    for name in profile_names():
        profile = load_profile(name)
        assert set(profile.engine_args) <= known, name
        for setting in ("attention_backend", "mm_encoder_attn_backend"):
            backend = profile.settings.get(setting)
            assert backend is None or backend in AttentionBackendEnum.__members__
        values: dict[str, Any] = profile.as_settings().get("engine_args", {})
        if "compilation_config" in values:
            CompilationConfig(**values["compilation_config"])  # refuses unknown names and modes
        KernelConfig(linear_backend=values.get("linear_backend", "auto"))
        arg_utils.EngineArgs(model="x", **values)
