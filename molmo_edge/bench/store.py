"""Result documents to disk and back: never half a file, never a foreign or an older one.

This module knows nothing about what a document means.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from molmo_edge.bench.document import FORMAT, VERSION, Document
from molmo_edge.errors import BenchmarkError


def dumps(document: Document) -> str:
    """The document as JSON text. Seconds keep microseconds, everything else six digits."""
    return json.dumps(_rounded(document.model_dump(mode="json")), indent=1, ensure_ascii=False)


def write(document: Document, path: Path) -> None:
    """Write ``document`` to ``path`` so that a reader sees the old file or the new, never half.

    Raises:
        BenchmarkError: the folder cannot be made or written.
    """
    write_text(dumps(document) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Atomic replacement of one text file (UTF-8); same errors as :func:`write`."""
    write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: Path) -> None:
    """Atomic replacement of one file; same errors as :func:`write`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise BenchmarkError(
            f"cannot write {path}: {exc.strerror or 'input/output error'}; "
            "choose a writable place with --output"
        ) from exc


def load(path: Path) -> Document:
    """Read and check a result document.

    Raises:
        BenchmarkError: the file is missing, not JSON, of another program, of another version
            of the format, or does not fit the schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise BenchmarkError(f"cannot read {path}: {exc.strerror or 'input/output error'}") from exc
    except ValueError as exc:
        raise BenchmarkError(f"{path} is not a JSON document; is it a benchmark result?") from exc
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BenchmarkError(
            f'{path} is not a benchmark result of molmo_edge: its "format" is not "{FORMAT}"'
        )
    version = data.get("version")
    if version != VERSION:
        raise BenchmarkError(
            f"{path} has result format version {version!r}, this molmo_edge reads version "
            f"{VERSION}; measure again, or read it with the molmo_edge that wrote it"
        )
    try:
        return Document.model_validate(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BenchmarkError(
            f"{path} does not fit the result schema at {where or 'the top'}: {first['msg']}"
        ) from exc


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
