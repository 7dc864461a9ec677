"""Molmo 2's configuration for transformers 5, without remote code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from molmo_edge.models.molmo2.config import (
    ADAPTER_DEFAULTS,
    TEXT_DEFAULTS,
    VIT_DEFAULTS,
    check_layout,
)


class VitConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of the vision tower."""

    model_type = "molmo2"
    base_config_key = "vit_config"

    def __init__(self, **kwargs: Any) -> None:
        _set(self, VIT_DEFAULTS, kwargs)


class AdapterConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of pooling and projector."""

    model_type = "molmo2"
    base_config_key = "adapter_config"

    def __init__(self, **kwargs: Any) -> None:
        _set(self, ADAPTER_DEFAULTS, kwargs)


class TextConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of the language model.

    `rope_scaling` is that of the layers in `rope_scaling_layers`, of all layers where that is None.
    """

    model_type = "molmo2_text"
    base_config_key = "text_config"

    def __init__(self, **kwargs: Any) -> None:
        values = {**TEXT_DEFAULTS, **kwargs}
        # Under this name vLLM and transformers 5 read it.
        rope = kwargs.pop("rope_parameters", None) or {
            "rope_type": "default",
            **(values["rope_scaling"] or {}),
            "rope_theta": values["rope_theta"],
        }
        kwargs.pop("rope_scaling", None)
        self.rope_parameters = dict(rope)
        _set(self, {k: v for k, v in TEXT_DEFAULTS.items() if k != "rope_scaling"}, kwargs)


class Molmo2Config(PretrainedConfig):  # type: ignore[misc]
    """The hub's `config.json` as it is. Raises ModelError for an unsupported layout."""

    model_type = "molmo2"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    sub_configs = {  # noqa: RUF012
        "vit_config": VitConfig,
        "adapter_config": AdapterConfig,
        "text_config": TextConfig,
    }

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # these classes are used whatever code the checkpoint names
        if kwargs:  # transformers compares with a config of no arguments
            check_layout({"model_type": "molmo2", **{k: _plain(v) for k, v in kwargs.items()}})
        for name, part in self.sub_configs.items():
            setattr(self, name, part(**_plain(kwargs.pop(name, {}))))
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


def register() -> None:
    """Make transformers read Molmo 2's configuration with these classes; may repeat."""
    AutoConfig.register("molmo2", Molmo2Config, exist_ok=True)


def _set(config: PretrainedConfig, defaults: Mapping[str, Any], values: dict[str, Any]) -> None:
    for name, default in defaults.items():
        setattr(config, name, values.pop(name, default))
    values.pop("model_type", None)
    PretrainedConfig.__init__(config, **values)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, PretrainedConfig) else value
