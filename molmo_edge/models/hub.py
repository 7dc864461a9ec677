"""From the name of a model to a local folder with its files, code files left out."""

from __future__ import annotations

import os
import re
from pathlib import Path

from molmo_edge.errors import MissingDependencyError, ModelError

STUB = "stub"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_DESCRIPTION = ("config.json", "tokenizer.json", "preprocessor_config.json")
# Data only: python files beside a checkpoint are never fetched.
_DATA_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/molmo_edge`, or `~/.cache/molmo_edge`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "molmo_edge"


def locate(model: str, cache_dir: Path, load_format: str = "auto") -> Path:
    """Folder of `model`: the stub, a local folder, or a hub name (fetched when not cached).

    With ``load_format="dummy"`` nothing is fetched for a Molmo of known shape: where its own files
    are not cached, a description with its sizes stands in for them.

    Raises:
        ModelError: no such folder, or the hub cannot be reached.
    """
    if model == STUB:
        from molmo_edge.models.molmo.stub import ensure_stub

        return ensure_stub(cache_dir)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if not _HUB_NAME.fullmatch(model) or folder.exists():
        raise ModelError(
            f"'{model}' is not a folder. Give a checkpoint folder, a hub name such as "
            "allenai/Molmo-7B-D-0924, or 'stub' for the built-in one."
        )
    if load_format == "dummy":
        from molmo_edge.models.molmo import shaped

        if shaped.is_known(model):
            return _cached(model) or shaped.ensure_shaped(model, cache_dir)
    return _from_hub(model)


def _cached(name: str) -> Path | None:
    """Folder of a hub name whose configuration and tokenizer were fetched before."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(name, file) for file in _DESCRIPTION]
    return Path(found[0]).parent if all(isinstance(path, str) for path in found) else None


def _from_hub(name: str) -> Path:
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
            f"'{name}' is neither a local folder nor reachable on the hub "
            f"({type(exc).__name__}). Download it elsewhere and give its folder."
        ) from exc
