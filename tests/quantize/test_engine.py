"""vLLM loads a quantised checkpoint, and its kernels compute with the stored weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.checkpoint_files import read_json
from molmo_edge.devices.detect import detect
from molmo_edge.models.molmo.synthetic import write_checkpoint
from molmo_edge.models.molmo2 import synthetic as molmo2
from molmo_edge.models.synthetic import write_json
from molmo_edge.quantize import quantize
from molmo_edge.quantize.formats import FORMATS, unpack
from molmo_edge.reference.verify import synthetic_image
from tests.quantize.support import layer_of, tensors_of

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        "avx512f" not in detect().cpu_isa,
        reason="vLLM's kernels of quantised layers are native on processors with AVX-512 only",
    ),
]

# FP8's largest value. The kernels give a token the scale (largest value) / 448, so that a token
# whose only value is this one has the scale 1 and loses nothing.
LARGEST = 448.0
# vLLM's names of the linear layers of a block, and the checkpoint's.
LAYERS = {
    "molmo": {
        "qkv_proj": "att_proj",
        "o_proj": "attn_out",
        "gate_up_proj": "ff_proj",
        "down_proj": "ff_out",
    },
    "molmo2": {
        "qkv_proj": "self_attn.att_proj",
        "o_proj": "self_attn.attn_out",
        "up_gate_proj": "mlp.ff_proj",
        "down_proj": "mlp.ff_out",
    },
}


def matrices(vlm: EdgeVLM) -> dict[str, torch.Tensor]:
    """Layer → (rows, columns) bfloat16: what vLLM's kernel makes of one-hot tokens."""
    largest = LARGEST
    names = LAYERS[vlm.family.name]

    # Nested, so that it is sent to the worker by value.
    def compute(worker: Any) -> dict[str, torch.Tensor]:
        layers = {}
        for name, module in worker.model_runner.model.named_modules():
            if (at := re.search(r"\.layers\.(\d+)\..*\.(\w+)$", name)) and at[2] in names:
                fp8 = getattr(module, "weight", None) is not None
                eye = torch.eye(module.input_size, dtype=torch.bfloat16) * (largest if fp8 else 1)
                rows = module.quant_method.apply(module, eye, None)
                layers[f"model.transformer.blocks.{at[1]}.{names[at[2]]}"] = rows.T.contiguous()
            elif name == "lm_head":
                fp8 = getattr(module, "weight", None) is not None
                eye = torch.eye(module.input_size, dtype=torch.bfloat16) * (largest if fp8 else 1)
                rows = worker.model_runner.model.logits_processor(module, eye)
                layers["lm_head"] = rows.T.contiguous()
        return layers

    (layers,) = vlm.in_engine_thread(lambda engine: engine.run(engine.llm.collective_rpc(compute)))
    return dict(layers)


def expected_matrix(parts: Mapping[str, torch.Tensor], scheme: str) -> torch.Tensor:
    """The same by plain torch from the stored tensors, (rows, columns) bfloat16."""
    if scheme == "fp8":
        # The kernel's order: a sum of FP8 products in float32, then the row's scale.
        return (LARGEST * parts["weight"].float() * parts["weight_scale"].float()).bfloat16()
    return unpack(parts, FORMATS[scheme]).bfloat16()


@pytest.mark.parametrize(
    ("family", "scheme", "head", "calibrated"),
    [
        ("molmo", "w4a16", "fp8", True),
        ("molmo", "fp8", "fp8", False),
        ("molmo2", "fp8", "w4a16", False),
    ],
)
def test_the_engine_computes_with_the_stored_weights(
    family: str,
    scheme: str,
    head: str,
    calibrated: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, and the model answers."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    # On a CPU with AMX vLLM computes 4-bit weights with 8-bit activations by default.
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    if family == "molmo":
        original = write_checkpoint(tmp_path / "original", seed=3)
    else:
        sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
        config = molmo2.hub_config(text=sizes)
        original = molmo2.write_checkpoint(tmp_path / "original", config, seed=3)
    Image.fromarray(synthetic_image(60, 80, 5)).save(tmp_path / "0.png")
    images = tmp_path if calibrated else None
    out = tmp_path / "out"
    directory = quantize(original, out, scheme, head=head, calibrate=images).directory
    if scheme == head:  # as other tools write it, which do not know the head's name in vLLM
        config = read_json(directory / "config.json")
        groups = config["quantization_config"]["config_groups"]
        assert groups.pop("group_1")["weights"] == groups["group_0"]["weights"]
        config["quantization_config"]["ignore"].append("lm_head")
        write_json(directory, {"config.json": config})
    with EdgeVLM(
        directory,
        engine="process",
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=1,
        kv_cache_memory_gb=0.1,
    ) as vlm:
        layers = matrices(vlm)
        image = Image.new("RGB", (64, 48))
        assert vlm.query(image, "x", max_tokens=2, ignore_eos=True).metrics.output_tokens == 2
    tensors = tensors_of(directory)
    assert len(layers) == 9
    for layer, matrix in layers.items():
        is_head = layer == "lm_head"
        name = "model.transformer.ff_out" if is_head and family == "molmo" else layer
        parts = layer_of(tensors, name)
        assert torch.equal(matrix, expected_matrix(parts, head if is_head else scheme)), layer
