"""Locate a model: a built-in one, a local directory, or a download from the hub without code."""

from __future__ import annotations

import hashlib
import re
import stat
from pathlib import Path

from safetensors import SafetensorError

from molmo_edge.devices.tensors import KNOWN
from molmo_edge.errors import MissingDependencyError, ModelError
from molmo_edge.files import expand_home, file_mode, replacing

DEMO, STUB, STUB2 = "demo", "stub", "stub-2"
DEMO_DIRECTORY = Path(__file__).with_name("demo")
DIGESTS = "SHA256SUMS"
"""Of the demo's files, as ``sha256sum`` writes and checks them."""
# The directory of each in the cache; its last number changes with the content of the files.
STUBS = {STUB: "stub-3", STUB2: "stub2-1"}
_STUB_NOTICE = (
    "This is a built-in stub: real Molmo architecture, random weights. Its answers mean nothing; "
    "give a checkpoint for real ones."
)
NOTICES = {
    DEMO: (
        "This is the built-in demo: a small Molmo 2 that knows drawn circles, squares, triangles "
        "and stars only; give a checkpoint for anything else."
    ),
    STUB: _STUB_NOTICE,
    STUB2: _STUB_NOTICE,
}
"""What must accompany every answer of a built-in model."""
_SHAPES_DIRECTORY = "shaped-2"

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Data only: a checkpoint's Python files are never downloaded.
_DATA_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def locate(model: str, cache_dir: Path, load_format: str = "auto") -> Path:
    """Return the directory of `model`, which is downloaded when it is a hub name not yet cached.

    With ``load_format="dummy"`` a Molmo of known sizes needs no download: a description with its
    sizes is written instead, whose tokenizer has the real number of tokens, not the real ones.

    Raises:
        ModelError: no such directory, the hub cannot be reached, `cache_dir` cannot be written, or
            the demo's files are damaged.
    """
    if model == DEMO:
        return _check_demo()
    if model in STUBS:
        return _write_once(cache_dir / STUBS[model], model)
    if not _is_hub_name(model):
        return expand_home(model).absolute()
    if load_format == "dummy" and _known_type(model) in ("molmo", "molmo2"):
        return _write_once(cache_dir / _SHAPES_DIRECTORY / model.rsplit("/", 1)[-1], model)
    return _download(model)


def locate_cached(model: str, cache_dir: Path) -> Path | None:
    """Return the directory of `model`, or None where `locate` would write or download it.

    Raises ModelError for no such directory, or damaged files of the demo.
    """
    if model in STUBS:
        directory = cache_dir / STUBS[model]
        return directory if file_mode(directory / "config.json") else None
    if model == DEMO or not _is_hub_name(model):
        return locate(model, cache_dir)
    try:
        return _download(model, local_files_only=True)
    except (MissingDependencyError, ModelError):
        return None


def _check_demo() -> Path:
    """Return the directory of the demo's checkpoint, which is part of the package."""
    try:
        lines = (DEMO_DIRECTORY / DIGESTS).read_text().splitlines() or [""]
        for digest, name in map(str.split, lines):
            if hashlib.sha256((DEMO_DIRECTORY / name).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} was changed")
    except (OSError, ValueError) as exc:
        raise ModelError(
            f"The demo's checkpoint, which is part of the package, is missing or damaged ({exc}). "
            "Install molmo-edge again, or give another model."
        ) from exc
    return DEMO_DIRECTORY


def _is_hub_name(model: str) -> bool:
    """Whether it is a hub name, not a directory. Raises ModelError if it is neither."""
    mode = file_mode(expand_home(model))
    if stat.S_ISDIR(mode):
        return False
    if not _HUB_NAME.fullmatch(model) or mode:
        raise ModelError(
            f"'{model}' is not a directory. Give a checkpoint directory, a hub name such as "
            "allenai/Molmo2-4B, or 'demo', 'stub' or 'stub-2' for a built-in one."
        )
    return True


def _write_once(directory: Path, model: str) -> Path:
    """Return `directory`, filled on first use: a stub (0.6 or 0.8 GB) or a description (4 MB)."""
    if file_mode(directory / "config.json"):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Here, since it imports torch.
        from molmo_edge.models.molmo import synthetic as molmo
        from molmo_edge.models.molmo2 import synthetic as molmo2

        second = model == STUB2 or _known_type(model) == "molmo2"
        family = molmo2 if second else molmo
        with replacing(directory) as made:
            if model in STUBS:
                family.write_stub(made)
            else:
                family.write_description(made, family.published_config(KNOWN[model]))
    except (OSError, SafetensorError) as exc:
        if file_mode(directory / "config.json"):  # another process was first
            return directory
        raise ModelError(
            f"The files of '{model}' cannot be written into '{directory.parent}'. Free 1 GB "
            "there, or name another directory with cache_dir or MOLMO_EDGE_CACHE_DIR."
        ) from exc
    return directory


def _known_type(model: str) -> str | None:
    return KNOWN.get(model, {}).get("model_type")


def _download(name: str, local_files_only: bool = False) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as exc:
        raise MissingDependencyError(
            'Hub names need vLLM\'s dependencies: pip install "molmo-edge[cuda]" (GPU) or '
            '"molmo-edge[cpu]".'
        ) from exc
    try:
        patterns = list(_DATA_FILES)
        return Path(
            snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as exc:
        raise ModelError(
            f"'{name}' is neither a local directory nor reachable on the hub "
            f"({type(exc).__name__}). Download it elsewhere and give its directory."
        ) from exc
