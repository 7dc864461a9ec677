"""Locate a model: the stub, a local directory, or a download from the hub without its code."""

from __future__ import annotations

import re
from pathlib import Path

from molmo_edge.errors import MissingDependencyError, ModelError
from molmo_edge.models.molmo import stub

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_DESCRIPTION = ("config.json", "tokenizer.json", "preprocessor_config.json")
# Data only: a checkpoint's Python files are never downloaded.
_DATA_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def locate(model: str, cache_dir: Path, load_format: str = "auto") -> Path:
    """Return the directory of `model`, which is downloaded when it is a hub name not yet cached.

    With ``load_format="dummy"`` a Molmo of known sizes needs no download: if its own files are not
    cached, a description with its sizes is written instead.

    Raises:
        ModelError: no such directory, or the hub cannot be reached.
    """
    if model == stub.NAME:
        return stub.ensure_stub(cache_dir)
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory.absolute()
    if not _HUB_NAME.fullmatch(model) or directory.exists():
        raise ModelError(
            f"'{model}' is not a directory. Give a checkpoint directory, a hub name such as "
            "allenai/Molmo-7B-D-0924, or 'stub' for the built-in one."
        )
    if load_format == "dummy" and stub.is_known(model):
        return _cached(model) or stub.ensure_description(model, cache_dir)
    return _download(model)


def _cached(name: str) -> Path | None:
    """Directory of a hub name whose configuration and tokenizer were downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    files = [try_to_load_from_cache(name, file) for file in _DESCRIPTION]
    return Path(files[0]).parent if all(isinstance(file, str) for file in files) else None


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as exc:
        raise MissingDependencyError(
            'Hub names need vLLM\'s dependencies: pip install "molmo-edge[cuda]" (GPU) or '
            '"molmo-edge[cpu]".'
        ) from exc
    try:
        return Path(snapshot_download(name, allow_patterns=list(_DATA_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as exc:
        raise ModelError(
            f"'{name}' is neither a local directory nor reachable on the hub "
            f"({type(exc).__name__}). Download it elsewhere and give its directory."
        ) from exc
