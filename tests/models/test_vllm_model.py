"""The corrected model without an engine around it."""

from __future__ import annotations

import pytest
import torch

from molmo_edge.errors import ConfigError

pytestmark = pytest.mark.slow


def test_pooling_attends_one_query_to_four_keys() -> None:
    from molmo_edge.models.molmo.vllm_model import PoolingAttention

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 1, 64, generator=generator)
    k, v = (torch.randn(6, 4, 64, generator=generator) for _ in range(2))
    heads = [x.unflatten(-1, (4, 16)) for x in (q, k, v)]
    scores = torch.einsum("bqhc,bkhc->bhqk", *heads[:2]) / 4
    expected = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), heads[2]).flatten(-2)
    assert torch.allclose(PoolingAttention(4, 16)(q, k, v), expected, atol=1e-6)


def test_registering_may_repeat_and_the_engine_gets_the_class() -> None:
    from vllm import ModelRegistry

    from molmo_edge import vllm_plugin
    from molmo_edge.models.molmo.family import ARCHITECTURE, STOCK_ARCHITECTURE, Molmo
    from molmo_edge.models.molmo.vllm_model import MolmoForCausalLM

    vllm_plugin.register()
    vllm_plugin.register()
    entry = ModelRegistry.models[ARCHITECTURE]
    assert entry.module_name == "molmo_edge.models.molmo.vllm_model"
    assert ModelRegistry.models[STOCK_ARCHITECTURE].module_name.startswith("vllm.")
    Molmo().prepare()
    assert ModelRegistry.models[ARCHITECTURE].model_cls is MolmoForCausalLM


def test_the_entry_point_is_in_vllms_group() -> None:
    from importlib.metadata import entry_points

    points = [e.value for e in entry_points(group="vllm.general_plugins") if e.name == "molmo_edge"]
    assert points == ["molmo_edge.vllm_plugin:register"]


def test_unknown_processor_options_are_refused() -> None:
    from molmo_edge.models.molmo.vllm_model import MolmoInfo

    class Context:
        def get_merged_mm_kwargs(self, kwargs: dict[str, object]) -> dict[str, object]:
            return kwargs

        def get_hf_image_processor_config(self) -> dict[str, object]:
            return {}

    info = MolmoInfo(Context())
    assert info.image_processor({"max_crops": 3, "truncation": False}).max_crops == 3
    with pytest.raises(ConfigError, match="max_crop,"):
        info.image_processor({"max_crop": 3, "other": 1})
