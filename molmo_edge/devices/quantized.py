"""Which precision a quantised checkpoint has, from its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FORMATS = {
    "nvfp4-pack-quantized": "nvfp4",
    "float-quantized": "fp8",
    "naive-quantized": "fp8",
}


def stored_precision(config: Mapping[str, Any]) -> str | None:
    """Precision of a checkpoint's dense weights, ``None`` when it is not quantised.

    A method this library has no name for is returned by its own name.
    """
    quant = config.get("quantization_config")
    text = config.get("text_config")
    if quant is None and isinstance(text, Mapping):
        quant = text.get("quantization_config")
    if not isinstance(quant, Mapping):
        return None
    method = str(quant.get("quant_method", "unknown")).lower()
    if method == "compressed-tensors":
        form = str(quant.get("format", ""))
        if form == "pack-quantized":
            return f"w{_bits(quant)}a16"
        return _FORMATS.get(form, form or method)
    if method == "modelopt":
        algorithm = str(quant.get("quant_algo", "")).lower()
        return algorithm if algorithm in ("nvfp4", "fp8") else method
    if method in ("gptq", "awq", "gptq_marlin", "awq_marlin", "auto-round", "intel/auto-round"):
        return f"w{_bits(quant)}a16"
    return method


def _bits(quant: Mapping[str, Any]) -> int:
    for key in ("bits", "w_bit"):
        if isinstance(quant.get(key), int):
            return int(quant[key])
    groups = quant.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and isinstance(weights.get("num_bits"), int):
            return int(weights["num_bits"])
    return 4
