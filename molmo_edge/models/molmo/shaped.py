"""Checkpoints without weights: the published models' sizes, for `load_format="dummy"`.

Configuration and tokenizer are made here, so that a device can be measured at a model's real shape
before its files are downloaded. The tokenizer has the real number of tokens, not the real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from molmo_edge.devices.model_configs import KNOWN
from molmo_edge.models.molmo.written import ensure_written

if TYPE_CHECKING:
    from molmo_edge.models.molmo.synthetic import Family, Shape

_VERSION = 1


def is_known(name: str) -> bool:
    """Whether the sizes of the hub's `name` are known here."""
    return KNOWN.get(name, {}).get("model_type") == "molmo"


def shape_of(name: str) -> tuple[Family, Shape]:
    """Kind and sizes of a model that `is_known`."""
    from molmo_edge.models.molmo.synthetic import Shape

    sizes = KNOWN[name]
    heads = int(sizes["num_attention_heads"])
    family: Family = "molmo-o" if sizes["attention_layer_norm"] else "molmo-d"
    return family, Shape(
        hidden_size=int(sizes["hidden_size"]),
        layers=int(sizes["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(sizes["num_key_value_heads"] or heads),
        mlp=int(sizes["intermediate_size"]) // 2,
        embedding_size=int(sizes["embedding_size"]),
    )


def ensure_shaped(name: str, cache_dir: Path) -> Path:
    """Folder of the description of a model that `is_known`, written on first use (4 MB).

    Raises ModelError when the cache folder cannot be written.
    """

    def write(folder: Path) -> None:
        from molmo_edge.models.molmo.synthetic import write_description

        write_description(folder, *shape_of(name))

    return ensure_written(
        cache_dir / f"shaped-{_VERSION}" / name.rsplit("/", 1)[-1],
        write,
        f"The description of {name} (a few MB)",
    )
