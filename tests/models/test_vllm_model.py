"""The corrected model without an engine around it."""

from __future__ import annotations

import pytest

from molmo_edge.errors import ConfigError

pytestmark = pytest.mark.slow


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
