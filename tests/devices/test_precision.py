"""The precision is decided before anything is loaded, and never silently something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from molmo_edge.devices.detect import DeviceInfo, detect, known_device
from molmo_edge.devices.precision import (
    Choice,
    check_kv_cache_dtype,
    choose_precision,
    usable_bytes,
)
from molmo_edge.devices.profiles import load_profile, select_profile
from molmo_edge.devices.shapes import model_shape
from molmo_edge.errors import ConfigError
from tests.devices.recorded import machine

MOLMO = model_shape("allenai/Molmo-7B-D-0924").bytes_by_precision()
CARD = known_device("rtx5080")
BOX = detect(machine("cpu"))


def choose(
    requested: str, device: DeviceInfo, sizes: Mapping[str, int] = MOLMO, **options: Any
) -> Choice:
    """The choice by the device's own profile."""
    options.setdefault("profile", select_profile(device)[0])
    return choose_precision(requested, device, sizes, **options)


def test_bf16_on_16_gb_becomes_fp8_with_a_message_when_auto() -> None:
    choice = choose("auto", CARD, profile=load_profile("cuda"))
    assert (choice.precision, choice.fallback) == ("fp8", True)
    assert choice.reason == (
        "BF16 weights (16.0 GB) do not fit 14.4 GB of usable memory on NVIDIA GeForce RTX 5080: "
        "loading them in FP8 (9.5 GB)"
    )


def test_a_precision_that_fits_is_kept_and_one_that_does_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"BF16 weights \(16.0 GB\) do not fit.*fp8 fits"):
        choose("bf16", CARD)
    assert choose("bf16", known_device("thor")).precision == "bf16"
    assert choose("auto", CARD).precision == "fp8"
    assert choose("auto", known_device("thor")).reason == "profile thor"
    h100 = choose("auto", known_device("h100"))
    assert (h100.precision, h100.fallback) == ("bf16", False)


def test_memory_that_others_use_counts() -> None:
    busy = replace(CARD, memory_available_bytes=8 << 30)
    with pytest.raises(ConfigError, match=r"FP8 weights .* do not fit"):
        choose("auto", busy)


def test_the_cache_must_fit_beside_the_weights() -> None:
    choose("fp8", CARD, kv_bytes=3 << 30)
    with pytest.raises(ConfigError, match=r"and 8\.6 GB of KV cache do not fit"):
        choose("fp8", CARD, kv_bytes=8 << 30)


def test_a_cpu_is_not_given_emulated_fp8_unasked() -> None:
    small = replace(BOX, memory_available_bytes=12 << 30)
    with pytest.raises(ConfigError, match="w4a16") as caught:
        choose("auto", small)
    assert "fp8 fits" not in str(caught.value)
    assert choose("fp8", small).precision == "fp8"  # but may be asked for


@pytest.mark.parametrize("name", ["w4a16", "nvfp4"])
def test_four_bits_need_a_quantised_checkpoint(name: str) -> None:
    with pytest.raises(ConfigError, match=f"molmo-edge quantize MODEL OUT --scheme {name}"):
        choose(name, CARD)
    assert choose(name, CARD, {name: 6 << 30}).precision == name
    assert choose("auto", CARD, {name: 6 << 30}).precision == name


def test_a_quantised_checkpoint_cannot_be_loaded_as_something_else() -> None:
    with pytest.raises(ConfigError, match=r"precision fp8 was requested.*quantised to w4a16"):
        choose("fp8", CARD, {"w4a16": 6 << 30})
    with pytest.raises(ConfigError, match="no longer loads bitsandbytes"):
        choose("auto", CARD, {"bitsandbytes": 6 << 30})
    with pytest.raises(ConfigError, match=r"W4A16 weights .* do not fit"):
        choose("auto", CARD, {"w4a16": 40 << 30})


def test_unknown_memory_lets_the_wish_through() -> None:
    unknown = DeviceInfo(name="NVIDIA GPU", kind="cuda")
    assert choose("auto", unknown).precision == "bf16"
    assert usable_bytes(unknown) is None


def test_usable_memory_keeps_to_what_is_free() -> None:
    card = detect(machine("rtx5080"))
    assert usable_bytes(card, 0.5) == int(17094934528 * 0.5) - (1 << 30)
    assert usable_bytes(replace(card, memory_available_bytes=2 << 30), 0.9) == 1 << 30
    assert usable_bytes(replace(card, memory_available_bytes=0)) == 0
    thor = detect(machine("thor"))  # a fraction of shared memory would be everyone's
    assert usable_bytes(thor, 0.3) == 120213504 * 1024 - (1 << 30)


@pytest.mark.parametrize(
    ("dtype", "device", "backend"),
    [("fp8", "h100", "FLASH_ATTN"), ("int8_per_token_head", "orin", "TRITON_ATTN")],
)
def test_a_cache_dtype_the_gpu_has_is_not_refused(dtype: str, device: str, backend: str) -> None:
    check_kv_cache_dtype(dtype, known_device(device), backend)
    check_kv_cache_dtype(dtype, DeviceInfo(name="NVIDIA GPU", kind="cuda"))  # nothing is known
