"""The corrected model, without an engine around it."""

from __future__ import annotations

import math

import pytest
import torch

from molmo_edge.errors import ConfigError


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    size = q.shape[-1] // heads
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(size)
            out[b, :, part] = torch.softmax(scores, dim=-1) @ v[b, :, part]
    return out


@pytest.mark.slow
def test_pooling_attends_one_query_to_four_keys() -> None:
    from molmo_edge.models.molmo.vllm_model import PoolingAttention

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 1, 64, generator=generator)
    k, v = (torch.randn(6, 4, 64, generator=generator) for _ in range(2))
    out = PoolingAttention(4, 16)(q, k, v)
    assert torch.allclose(out, naive_attention(q, k, v, 4), atol=1e-6)
    # Each of the four keys counts.
    for i in range(4):
        changed = v.clone()
        changed[:, i] += 1
        assert not torch.allclose(PoolingAttention(4, 16)(q, k, changed), out)


@pytest.mark.slow
def test_registering_twice_is_harmless_and_the_model_is_ours() -> None:
    from vllm import ModelRegistry

    from molmo_edge import vllm_plugin as plugin

    plugin.register()
    plugin.register()
    entry = ModelRegistry.models[plugin.ARCHITECTURE]
    assert entry.module_name == "molmo_edge.models.molmo.vllm_model"
    plugin.use_model(stock=True)
    assert ModelRegistry.models[plugin.ARCHITECTURE].module_name.startswith("vllm.")
    plugin.use_model(stock=False)


@pytest.mark.slow
def test_an_engine_of_ours_gets_the_class_unless_vllms_own_was_chosen() -> None:
    from vllm import ModelRegistry

    from molmo_edge import vllm_plugin as plugin
    from molmo_edge.models.molmo.vllm_model import MolmoForCausalLM

    try:
        plugin.prepare()
        assert ModelRegistry.models[plugin.ARCHITECTURE].model_cls is MolmoForCausalLM
        plugin.use_model(stock=True)
        plugin.prepare()
        plugin.register()
        assert ModelRegistry.models[plugin.ARCHITECTURE].module_name.startswith("vllm.")
    finally:
        plugin.use_model(stock=False)


def test_the_entry_point_is_in_vllms_group() -> None:
    from importlib.metadata import entry_points

    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "molmo_edge"]
    assert [e.value for e in found] == ["molmo_edge.vllm_plugin:register"]


@pytest.mark.slow
def test_unknown_processor_options_are_refused() -> None:
    from molmo_edge.models.molmo.vllm_model import MolmoInfo

    class Context:
        def get_merged_mm_kwargs(self, kwargs: dict[str, object]) -> dict[str, object]:
            return kwargs

    info = MolmoInfo(Context())
    assert info.options({"max_crops": 3, "truncation": False}) == {"max_crops": 3}
    with pytest.raises(ConfigError, match="max_crop,"):
        info.options({"max_crop": 3, "other": 1})
