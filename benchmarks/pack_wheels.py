"""Packs wheels for a machine that only has PyTorch and takes files of limited size, and unpacks.

    python benchmarks/pack_wheels.py pack --output parts vllm-0.32.0-*.whl more/*.whl
    python benchmarks/pack_wheels.py unpack --target /tmp/site parts
    python benchmarks/pack_wheels.py check --target /tmp/site vllm transformers molmo_edge

`pack` leaves out what a Molmo needs in no configuration (`DROPPED`), writes all that stays into one
compressed archive, and cuts it. `unpack` needs the standard library alone: run this very file
there. `check` imports the packages from the folder, each in a fresh process, and says what failed;
compiled modules of another platform or torch fail there with a reason, Python ones must not.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.machinery
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

PIECE_BYTES = 60_000_000
MANIFEST = "manifest.json"
_BLOCK = 1 << 20

DROPPED = (
    # FlashAttention 2 and 3: half of the wheel. Without them vLLM takes Triton's kernels.
    "vllm/vllm_flash_attn/_vllm_fa2_C*",
    "vllm/vllm_flash_attn/_vllm_fa3_C*",
    # Kernels of mixtures of experts and of MLA; Molmo has neither.
    "vllm/_moe_C*",
    "vllm/_flashmla*_C*",
    "vllm/_qutlass_C*",
    # C++ headers and sources of kernels compiled on the spot for other models.
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
    # The server's Rust front end, its parsers and its pages.
    "vllm/vllm-rs",
    "vllm/_rust_*",
    "vllm/entrypoints/*/static/*",
)
"""Patterns of paths within wheels; ``*`` crosses folders."""


class PackError(Exception):
    """Something cannot be packed, unpacked or imported; the message says what."""


def dropped(path: str, patterns: Sequence[str] = DROPPED) -> bool:
    """Whether a path within a wheel is left out."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def placed(path: str) -> str | None:
    """Where a wheel's file goes under the target; None for what is installed elsewhere.

    `NAME.data/purelib` and `platlib` are the package folder itself; scripts and headers stay out.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise PackError(f"'{path}' points outside the wheel; it is not unpacked")
    if pure.parts and pure.parts[0].endswith(".data"):
        if len(pure.parts) > 2 and pure.parts[1] in ("purelib", "platlib"):
            return str(PurePosixPath(*pure.parts[2:]))
        return None
    return path


def pack(wheels: Sequence[Path], output: Path, *, piece_bytes: int = PIECE_BYTES,
         patterns: Sequence[str] = DROPPED) -> dict[str, object]:  # fmt: skip
    """Writes pieces and their manifest into `output`, empty or new; returns the manifest."""
    if not wheels or piece_bytes < 1:
        raise PackError("give at least one wheel, and pieces of at least one byte")
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise PackError(f"'{output}' is not empty; name a new folder")
    pieces = _Pieces(output, piece_bytes)
    left_out = 0
    with pieces, tarfile.open(fileobj=pieces, mode="w|xz") as archive:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as source:
                for entry in source.infolist():
                    target = placed(entry.filename)
                    if entry.is_dir() or target is None:
                        continue
                    if dropped(target, patterns):
                        left_out += entry.file_size
                        continue
                    info = tarfile.TarInfo(target)
                    info.size = entry.file_size
                    # Programs that packages bring, such as ptxas, must stay executable.
                    info.mode = (entry.external_attr >> 16) & 0o755 | 0o644
                    with source.open(entry) as data:
                        archive.addfile(info, data)
    manifest: dict[str, object] = {
        "pieces": pieces.finish(),
        "wheels": [wheel.name for wheel in wheels],
        "left_out": list(patterns),
        "left_out_bytes": left_out,
    }
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def unpack(folder: Path, target: Path) -> None:
    """Puts the pieces of `folder` together under `target`, each checked against the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    reader = io.BufferedReader(_Joined(folder, manifest["pieces"]), _BLOCK)
    with tarfile.open(fileobj=reader, mode="r|xz") as archive:
        # Python before 3.11.4 has no filters; what is unpacked here was checked piece by piece.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(target)


def check(target: Path, modules: Sequence[str]) -> dict[str, str | None]:
    """Imports each module in a fresh process with `target` first; None, or why it failed.

    Raises:
        PackError: a module was imported from elsewhere, or compiled modules there are for another
            Python.
    """
    out: dict[str, str | None] = {}
    # -P: the folder this is started in must not come before the target.
    for name in modules:
        code = f"import {name}; print({name}.__file__)"
        environ = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environ, capture_output=True, text=True
        )
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        last = lines[-1] if lines else "no output"
        if done.returncode == 0 and not Path(last).resolve().is_relative_to(target.resolve()):
            raise PackError(f"{name} was imported from elsewhere, not from '{target}'")
        out[name] = None if done.returncode == 0 else last
    return out


def foreign(target: Path) -> list[str]:
    """Compiled modules under `target` that this Python will not load, by their names."""
    mine = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return sorted(
        str(path.relative_to(target))
        for path in target.rglob("*.cpython-*.so")
        if not path.name.endswith(mine)
    )


class _Pieces(io.RawIOBase):
    """A writer that begins a new file whenever one is full."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._found: list[dict[str, object]] = []
        self._file: io.BufferedWriter | None = None
        self._room = 0
        self._digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        total = len(view)
        while view:
            if self._file is None or self._room == 0:
                self._close_one()
                name = f"piece-{len(self._found):03d}"
                self._file = (self._folder / name).open("wb")
                self._room, self._digest = self._size, hashlib.sha256()
            part = view[: self._room]
            self._file.write(part)
            self._digest.update(part)
            self._room -= len(part)
            view = view[len(part) :]
        return total

    def finish(self) -> list[dict[str, object]]:
        self._close_one()
        return self._found

    def close(self) -> None:
        self._close_one()
        super().close()

    def _close_one(self) -> None:
        if self._file is not None:
            name = Path(self._file.name).name
            self._file.close()
            self._file = None
            self._found.append({"name": name, "sha256": self._digest.hexdigest()})


class _Joined(io.RawIOBase):
    """A reader over all pieces in order."""

    def __init__(self, folder: Path, pieces: Sequence[dict[str, str]]) -> None:
        self._blocks = self._read(folder, pieces)
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = block
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    @staticmethod
    def _read(folder: Path, pieces: Sequence[dict[str, str]]) -> Iterator[bytes]:
        for piece in pieces:
            path = folder / piece["name"]
            if not path.is_file():
                raise PackError(f"the piece '{piece['name']}' is missing in '{folder}'")
            # Before any of it is unpacked.
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != piece["sha256"]:
                    raise PackError(f"the piece '{piece['name']}' is not what was packed")
                file.seek(0)
                while block := file.read(_BLOCK):
                    yield block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("pack", help="wheels to pieces")
    one.add_argument("wheels", nargs="+", type=Path)
    one.add_argument("--output", type=Path, required=True, help="new folder for the pieces")
    one.add_argument("--piece-mb", type=int, default=PIECE_BYTES // 10**6)
    one.add_argument("--keep-all", action="store_true", help="leave nothing out")
    two = verbs.add_parser("unpack", help="pieces to a folder for PYTHONPATH")
    two.add_argument("pieces", type=Path)
    two.add_argument("--target", type=Path, required=True)
    three = verbs.add_parser("check", help="import packages from such a folder")
    three.add_argument("modules", nargs="+")
    three.add_argument("--target", type=Path, required=True)
    asked = parser.parse_args()
    try:
        if asked.verb == "pack":
            patterns = () if asked.keep_all else DROPPED
            made = pack(
                asked.wheels, asked.output, piece_bytes=asked.piece_mb * 10**6, patterns=patterns
            )
            print(json.dumps(made, indent=1))
        elif asked.verb == "unpack":
            unpack(asked.pieces, asked.target)
        else:
            found = check(asked.target, asked.modules)
            for name, error in found.items():
                print(f"{name}: {'imported' if error is None else error}")
            sys.exit(1 if any(found.values()) else 0)
    except (PackError, OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as exc:
        sys.exit(f"error: {exc}")


if __name__ == "__main__":
    main()
