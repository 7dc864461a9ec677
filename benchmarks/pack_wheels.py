"""Pack wheels for a machine that only has PyTorch and takes files of limited size, and unpack them.

    python benchmarks/pack_wheels.py pack --output parts vllm-0.32.0-*.whl more/*.whl
    python benchmarks/pack_wheels.py unpack --target /tmp/site parts
    python benchmarks/pack_wheels.py check --target /tmp/site vllm transformers molmo_edge

`pack` leaves out what a Molmo needs in no configuration (`DROPPED`), writes the rest into one
compressed archive, and cuts it into pieces. `unpack` needs the standard library alone: run this
very file there. `check` imports the packages, each in a fresh process, and prints what failed.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

PIECE_BYTES = 60_000_000
MANIFEST = "manifest.json"

DROPPED = (
    # FlashAttention 2 and 3: half of the wheel. Without them vLLM takes Triton's kernels.
    "vllm/vllm_flash_attn/_vllm_fa2_C*",
    "vllm/vllm_flash_attn/_vllm_fa3_C*",
    # Kernels of mixtures of experts and of MLA; Molmo has neither.
    "vllm/_moe_C*",
    "vllm/_flashmla*_C*",
    "vllm/_qutlass_C*",
    # C++ headers and sources of kernels compiled on demand for other models.
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
    # The server's Rust front end, its parsers and its pages.
    "vllm/vllm-rs",
    "vllm/_rust_*",
    "vllm/entrypoints/*/static/*",
)
"""Patterns of paths within wheels; ``*`` crosses directories."""


class PackError(Exception):
    """Something cannot be packed, unpacked or imported; the message says what."""


def is_dropped(path: str, patterns: Sequence[str] = DROPPED) -> bool:
    """Whether a path within a wheel is left out."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def destination(path: str) -> str | None:
    """Where a wheel's file goes under the target; None for scripts and headers.

    `NAME.data/purelib` and `platlib` are the package directory itself.
    """
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts:
        raise PackError(f"'{path}' points outside the wheel; it is not unpacked")
    if parts and parts[0].endswith(".data"):
        inner = len(parts) > 2 and parts[1] in ("purelib", "platlib")
        return str(PurePosixPath(*parts[2:])) if inner else None
    return path


def pack(
    wheels: Sequence[Path],
    output: Path,
    *,
    piece_bytes: int = PIECE_BYTES,
    patterns: Sequence[str] = DROPPED,
) -> dict[str, Any]:
    """Write pieces and their manifest into `output`, empty or new; returns the manifest."""
    if not wheels or piece_bytes < 1:
        raise PackError("give at least one wheel, and pieces of at least one byte")
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise PackError(f"'{output}' is not empty; name a new directory")
    left_out = 0
    pieces = []
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w:xz") as archive:
            for wheel in wheels:
                left_out += _add(wheel, archive, patterns)
        whole.seek(0)
        while piece := whole.read(piece_bytes):
            name = f"piece-{len(pieces):03d}"
            (output / name).write_bytes(piece)
            pieces.append({"name": name, "sha256": hashlib.sha256(piece).hexdigest()})
    manifest = {
        "pieces": pieces,
        "wheels": [wheel.name for wheel in wheels],
        "left_out": list(patterns),
        "left_out_bytes": left_out,
    }
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _add(wheel: Path, archive: tarfile.TarFile, patterns: Sequence[str]) -> int:
    """Add a wheel's files; returns the bytes left out."""
    left_out = 0
    with zipfile.ZipFile(wheel) as source:
        for entry in source.infolist():
            target = destination(entry.filename)
            if entry.is_dir() or target is None:
                continue
            if is_dropped(target, patterns):
                left_out += entry.file_size
                continue
            info = tarfile.TarInfo(target)
            info.size = entry.file_size
            # Programs that packages bring, such as ptxas, must stay executable.
            info.mode = (entry.external_attr >> 16) & 0o755 | 0o644
            with source.open(entry) as data:
                archive.addfile(info, data)
    return left_out


def unpack(directory: Path, target: Path) -> None:
    """Unpack the pieces of `directory` under `target`, each checked against the manifest."""
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as whole:
        for piece in manifest["pieces"]:
            path = directory / piece["name"]
            if not path.is_file():
                raise PackError(f"the piece '{path.name}' is missing in '{directory}'")
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != piece["sha256"]:
                raise PackError(f"the piece '{path.name}' differs from what was packed")
            whole.write(data)
        whole.seek(0)
        with tarfile.open(fileobj=whole, mode="r:xz") as archive:
            archive.extractall(target, filter="data")


def check(target: Path, modules: Sequence[str]) -> dict[str, str | None]:
    """Import each module in a fresh process with `target` first; None, or why it failed.

    Raises:
        PackError: a module was imported from elsewhere.
    """
    out: dict[str, str | None] = {}
    environ = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in modules:
        code = f"import {name}; print({name}.__file__)"
        # -P: the current directory must not come before the target.
        process = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environ, capture_output=True, text=True
        )
        lines = (process.stderr if process.returncode else process.stdout).strip().splitlines()
        last = lines[-1] if lines else "no output"
        if process.returncode == 0 and not Path(last).resolve().is_relative_to(target.resolve()):
            raise PackError(f"{name} was imported from elsewhere, not from '{target}'")
        out[name] = last if process.returncode else None
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("pack", help="wheels to pieces")
    verb.add_argument("wheels", nargs="+", type=Path)
    verb.add_argument("--output", type=Path, required=True, help="new directory for the pieces")
    verb.add_argument("--piece-mb", type=int, default=PIECE_BYTES // 10**6)
    verb.add_argument("--keep-all", action="store_true", help="leave nothing out")
    verb = verbs.add_parser("unpack", help="pieces to a directory for PYTHONPATH")
    verb.add_argument("pieces", type=Path)
    verb.add_argument("--target", type=Path, required=True)
    verb = verbs.add_parser("check", help="import packages from such a directory")
    verb.add_argument("modules", nargs="+")
    verb.add_argument("--target", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        if arguments.verb == "pack":
            patterns = () if arguments.keep_all else DROPPED
            size = arguments.piece_mb * 10**6
            manifest = pack(arguments.wheels, arguments.output, piece_bytes=size, patterns=patterns)
            print(json.dumps(manifest, indent=1))
        elif arguments.verb == "unpack":
            unpack(arguments.pieces, arguments.target)
        else:
            errors = check(arguments.target, arguments.modules)
            for name, error in errors.items():
                print(f"{name}: {'imported' if error is None else error}")
            sys.exit(1 if any(errors.values()) else 0)
    except (PackError, OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as exc:
        sys.exit(f"error: {exc}")


if __name__ == "__main__":
    main()
