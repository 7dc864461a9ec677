"""A quantised checkpoint runs in the real engine and means there what plain torch says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.models.molmo.synthetic import write_checkpoint
from molmo_edge.quantize import run as quantize
from molmo_edge.quantize.formats import format_of, unpack
from molmo_edge.reference.verify import QUESTION, reference_answers
from molmo_edge.reference.verify import synthetic_image as picture
from tests.quant_support import dequantised, layer_of, tensors_of, threads

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

# The checkpoint's layers by vLLM's names.
LAYERS = {
    "qkv_proj": "att_proj",
    "o_proj": "attn_out",
    "gate_up_proj": "ff_proj",
    "down_proj": "ff_out",
}
# FP8's largest value. The kernels give a token the scale (largest value) / 448, so that a token
# whose only value is this one has the scale 1 and loses nothing.
LARGEST = 448.0


def matrices(worker: Any) -> dict[str, torch.Tensor]:
    """The checkpoint's layer → (rows, columns) bfloat16: what its kernel makes of one-hot tokens.

    Runs in vLLM's worker, on layers as vLLM loaded and repacked them.
    """
    found = {}
    for name, module in worker.model_runner.model.named_modules():
        if (at := re.search(r"\.layers\.(\d+)\..*\.(\w+)$", name)) and at[2] in LAYERS:
            fp8 = getattr(module, "weight", None) is not None
            eye = torch.eye(module.input_size, dtype=torch.bfloat16) * (LARGEST if fp8 else 1)
            made = module.quant_method.apply(module, eye, None)
            found[f"model.transformer.blocks.{at[1]}.{LAYERS[at[2]]}"] = made.T.contiguous()
    return found


def meant(parts: Mapping[str, torch.Tensor], scheme: str) -> torch.Tensor:
    """The same by plain torch from the stored tensors, (rows, columns) bfloat16."""
    if scheme == "fp8":
        # The scheme's own order: a sum of FP8 products in float32, then the row's scale.
        return (LARGEST * parts["weight"].float() * parts["weight_scale"].float()).bfloat16()
    return unpack(parts, format_of(scheme)).bfloat16()


# Measured: 0.03 for w4a16; 0.10 for fp8, whose activations have three bits of mantissa.
@pytest.mark.parametrize(
    ("scheme", "calibrated", "int8_activations", "kernels"),
    [("w4a16", False, "1", 0.1), ("w4a16", True, "0", 0.1), ("fp8", False, "1", 0.2)],
    ids=["w4a16", "w4a16 calibrated, bfloat16 activations", "fp8"],
)
def test_the_real_engine_runs_it_as_the_dequantised_yardstick(
    scheme: str,
    calibrated: bool,
    int8_activations: str,
    kernels: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers bit for bit; answers as near as kernels in bfloat16 (and FP8 activations) allow."""
    # On a CPU with AMX vLLM computes 4-bit weights with 8-bit activations unless told not to.
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", int8_activations)
    original = write_checkpoint(tmp_path / "original", seed=3)
    Image.fromarray(picture(60, 80, 5)).save(tmp_path / "seen.png")
    quantised = quantize.quantize(
        original, tmp_path / "out", scheme, calibrate=tmp_path if calibrated else None
    ).folder
    plain = dequantised(quantised, tmp_path / "plain", scheme)
    pictures = {"small": picture(90, 120, 0), "text only": None}
    with threads(2):
        yardstick = reference_answers(plain, pictures, 8)
        whole = reference_answers(original, pictures, 8)
    with EdgeVLM(
        quantised, dtype="bfloat16", max_model_len=1024, max_num_seqs=1, kv_cache_memory_gb=0.1
    ) as vlm:
        (found,) = vlm.in_engine_thread(lambda engine: engine.llm.collective_rpc(matrices))
        for name, image in pictures.items():
            for expected, bound in ((yardstick[name], kernels), (whole[name], 0.75)):
                scored = vlm.score(image, QUESTION, expected.token_ids).logprobs
                pairs = zip(scored, expected.logprobs, strict=True)
                assert max(abs(a - b) for a, b in pairs) < bound
    tensors = tensors_of(quantised)
    assert len(found) == 8
    for layer, matrix in found.items():
        parts = layer_of(tensors, layer)
        assert torch.equal(matrix, meant(parts, scheme)), layer
        # The weights themselves, to one step of bfloat16 where float32 rounds in another order.
        weight = unpack(parts, format_of(scheme)) * (LARGEST if scheme == "fp8" else 1)
        assert bool(((matrix - weight).abs() <= weight.abs() * 2**-8).all()), layer
