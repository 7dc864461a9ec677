"""Molmo 1's configuration class for transformers 5, reading the hub's `config.json` as it is."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from molmo_edge.models.molmo.layout import check_layout


class MolmoConfig(PretrainedConfig):  # type: ignore[misc]
    """Fields as in the hub's `config.json`; `intermediate_size` counts both halves of `ff_proj`.

    A layout that is not supported raises ModelError here, before anything is loaded.
    """

    model_type = "molmo"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 152064,
        embedding_size: int | None = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 37888,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        layer_norm_eps: float = 1e-6,
        rope_theta: float = 1_000_000.0,
        clip_qkv: float | None = None,
        qkv_bias: bool = True,
        weight_tying: bool = False,
        use_position_ids: bool = True,
        attention_layer_norm: bool = False,
        norm_after: bool = False,
        layer_norm_type: str = "rms",
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size if embedding_size is not None else vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        # null on the hub (7B-O) means one key/value head for each head.
        self.num_key_value_heads = (
            num_key_value_heads if num_key_value_heads is not None else num_attention_heads
        )
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.layer_norm_eps = layer_norm_eps
        self.clip_qkv = clip_qkv
        self.qkv_bias = qkv_bias
        self.weight_tying = weight_tying
        self.use_position_ids = use_position_ids
        self.attention_layer_norm = attention_layer_norm
        self.norm_after = norm_after
        self.layer_norm_type = layer_norm_type
        # Our classes are used whatever code the checkpoint points at.
        kwargs.pop("auto_map", None)
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            rope_parameters=kwargs.pop("rope_parameters", None)
            or {"rope_type": "default", "rope_theta": rope_theta},
            **kwargs,
        )
        check_layout(
            {
                **{key: value for key, value in kwargs.items() if key.startswith("moe_")},
                **{
                    key: getattr(self, key)
                    for key in (
                        "model_type",
                        "layer_norm_type",
                        "clip_qkv",
                        "weight_tying",
                        "use_position_ids",
                        "hidden_size",
                        "intermediate_size",
                        "num_hidden_layers",
                        "num_attention_heads",
                        "qkv_bias",
                        "attention_layer_norm",
                        "norm_after",
                    )
                },
            }
        )
