"""Molmo 2's configuration and chat template for transformers 5, without remote code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, AutoProcessor, PretrainedConfig
from transformers.processing_utils import ProcessorMixin

from molmo_edge.checkpoint_files import read_json
from molmo_edge.devices.tensors import ADAPTER_DEFAULTS, TEXT_DEFAULTS, VIT_DEFAULTS
from molmo_edge.models.molmo2.config import check_layout
from molmo_edge.models.prompts import template_with_bos


class _Part(PretrainedConfig):  # type: ignore[misc]
    """A part of `config.json`, and the values of what it leaves out."""

    model_type = "molmo2"
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, **kwargs: Any) -> None:
        for name, default in self.defaults.items():
            setattr(self, name, kwargs.pop(name, default))
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)


class VitConfig(_Part):
    """Sizes of the vision tower."""

    base_config_key = "vit_config"
    defaults = VIT_DEFAULTS


class AdapterConfig(_Part):
    """Sizes of pooling and projector."""

    base_config_key = "adapter_config"
    defaults = ADAPTER_DEFAULTS


class TextConfig(_Part):
    """Sizes of the language model.

    `rope_scaling` is that of the layers in `rope_scaling_layers`, of all layers where that is None.
    """

    model_type = "molmo2_text"
    base_config_key = "text_config"
    defaults: ClassVar[Mapping[str, Any]] = {
        key: value for key, value in TEXT_DEFAULTS.items() if key != "rope_scaling"
    }

    def __init__(self, **kwargs: Any) -> None:
        # Under this name vLLM and transformers 5 read it.
        self.rope_parameters = kwargs.pop("rope_parameters", None) or {
            "rope_type": "default",
            **(kwargs.get("rope_scaling") or {}),
            "rope_theta": kwargs.get("rope_theta", TEXT_DEFAULTS["rope_theta"]),
        }
        kwargs.pop("rope_scaling", None)
        super().__init__(**kwargs)


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


class Molmo2Processor(ProcessorMixin):  # type: ignore[misc]
    """The chat template of vLLM's server, which asks a processor for it before the tokenizer."""

    def __init__(self, chat_template: str | None) -> None:
        super().__init__(chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, directory: str, **_: Any) -> Molmo2Processor:
        """Read a checkpoint's files; keyword arguments of transformers are ignored.

        Not its tokenizer: vLLM asks at every start, and that takes longer than all else here.
        """
        names = read_json(Path(directory, "tokenizer_config.json"))
        file = Path(directory, "chat_template.jinja")
        template = file.read_text() if file.is_file() else names.get("chat_template")
        bos = names.get("bos_token") or names["eos_token"]
        return cls(template_with_bos(template, bos if isinstance(bos, str) else bos["content"]))


def register() -> None:
    """Make transformers read Molmo 2's files with these classes; may repeat."""
    AutoConfig.register("molmo2", Molmo2Config, exist_ok=True)
    AutoProcessor.register(Molmo2Config, Molmo2Processor, exist_ok=True)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, PretrainedConfig) else value
