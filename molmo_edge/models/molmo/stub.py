"""Checkpoints without a download: the built-in stub, and published models without their weights.

The stub has Molmo's real architecture and random weights, except that the embedding and the head
of its tiny language model hold a next-token table that spells `TEXT`. Imports no torch until
something must be written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from molmo_edge.devices.tensors import KNOWN
from molmo_edge.errors import ModelError
from molmo_edge.models.molmo.config import Family

NAME = "stub"
# `TEXT` in tokens: no token twice, nor the colon of "Assistant:", which starts it.
TOKENS = (
    "ĠThis Ġis Ġthe Ġmolmo _ edge Ġstub Ġ ( real Ġarchitecture , Ġrandom Ġweights ) ."
).split()
TEXT = "This is the molmo_edge stub (real architecture, random weights)."
NOTICE = (
    "This is the built-in stub: real Molmo architecture, random weights. Its answers mean "
    "nothing; give a checkpoint for real ones."
)
_STUB_VERSION = 2
_DESCRIPTION_VERSION = 1


def ensure_stub(cache_dir: Path) -> Path:
    """Directory of the stub checkpoint (0.6 GB), written on first use. Raises ModelError."""

    def write(directory: Path) -> None:
        from molmo_edge.models.molmo.synthetic import hub_config, stub_weights, write_checkpoint

        write_checkpoint(directory, weights=stub_weights(hub_config(), TOKENS))

    return _ensure(cache_dir / f"stub-{_STUB_VERSION}", write, "The stub checkpoint (0.6 GB)")


def is_known(name: str) -> bool:
    """Whether `ensure_description` knows the sizes of the hub's `name`."""
    return KNOWN.get(name, {}).get("model_type") == "molmo"


def ensure_description(name: str, cache_dir: Path) -> Path:
    """Directory of a published model without weights, written on first use (4 MB).

    For `load_format="dummy"`: a device can be measured at a model's real shape before a download.
    The tokenizer has the real number of tokens, not the real ones. Raises ModelError.
    """

    def write(directory: Path) -> None:
        from molmo_edge.models.molmo.synthetic import hub_config, write_description

        sizes = {**KNOWN[name], "vocab_size": KNOWN[name]["embedding_size"]}
        family: Family = "molmo-d" if sizes["qkv_bias"] else "molmo-o"
        write_description(directory, hub_config(family, **sizes))

    directory = cache_dir / f"shaped-{_DESCRIPTION_VERSION}" / name.rsplit("/", 1)[-1]
    return _ensure(directory, write, f"The description of {name} (a few MB)")


def _ensure(directory: Path, write: Callable[[Path], None], what: str) -> Path:
    """Return `directory`, filled by `write` on first use.

    Written elsewhere and renamed: a killed or concurrent start leaves no incomplete checkpoint.
    Raises ModelError, which names `what`, when the cache directory cannot be written.
    """
    if (directory / "config.json").is_file():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="making-", dir=directory.parent) as work:
            made = Path(work) / directory.name
            write(made)
            try:
                made.rename(directory)
            except OSError:  # another process was first
                if not (directory / "config.json").is_file():
                    raise
    except OSError as exc:
        raise ModelError(
            f"{what} cannot be written into '{directory.parent}'. Free space there, or name "
            "another directory with cache_dir or MOLMO_EDGE_CACHE_DIR."
        ) from exc
    return directory
