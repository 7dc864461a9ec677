"""Checkpoint folders that are written on first use; imports no torch, for when they are there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from molmo_edge.errors import ModelError


def ensure_written(folder: Path, write: Callable[[Path], object], what: str) -> Path:
    """`folder`, filled by `write` on first use.

    Written aside and renamed: a killed or concurrent start leaves no half checkpoint. Raises
    ModelError, with `what` was to be written, when the cache folder cannot take it.
    """
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
        try:
            write(work)
            try:
                work.rename(folder)
            except OSError:
                if not (folder / "config.json").is_file():
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as exc:
        raise ModelError(
            f"{what} cannot be written into '{folder.parent}'. Free space there, or name another "
            "folder with cache_dir or MOLMO_EDGE_CACHE_DIR."
        ) from exc
    return folder
