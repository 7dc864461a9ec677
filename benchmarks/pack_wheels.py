"""Pack wheels for a machine that only has PyTorch and takes files of limited size, and unpack them.

    python benchmarks/pack_wheels.py pack --output parts vllm-0.32.0-*.whl more/*.whl
    python benchmarks/pack_wheels.py unpack --target /tmp/site parts

`pack` leaves out what a Molmo needs in no configuration (`DROPPED`), writes the rest into one
compressed archive, and cuts it into pieces; xz checks what is unpacked. `unpack` needs the standard
library alone: run this very file there.
"""

from __future__ import annotations

import argparse
import fnmatch
import lzma
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

PIECE_BYTES = 60_000_000

DROPPED = (
    # FlashAttention 2: half of the wheel. Without it vLLM takes Triton's kernels, or on Hopper
    # FlashAttention 3, which packs well.
    "vllm/vllm_flash_attn/_vllm_fa2_C*",
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


def destination(path: str) -> str | None:
    """Where a wheel's file goes under the target; None for scripts, headers and what is left out.

    `NAME.data/purelib` and `platlib` are the package directory itself.
    """
    parts = PurePosixPath(path).parts
    if parts[0].endswith(".data"):
        if len(parts) < 3 or parts[1] not in ("purelib", "platlib"):
            return None
        path = str(PurePosixPath(*parts[2:]))
    return None if any(fnmatch.fnmatchcase(path, pattern) for pattern in DROPPED) else path


def pack(wheels: Sequence[Path], output: Path, *, piece_bytes: int = PIECE_BYTES) -> int:
    """Write pieces into `output`, empty or new; returns their number."""
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise ValueError(f"'{output}' is not empty; name a new directory")
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w:xz") as archive:
            for wheel in wheels:
                _add(wheel, archive)
        whole.seek(0)
        count = 0
        while piece := whole.read(piece_bytes):
            (output / f"piece-{count:03d}").write_bytes(piece)
            count += 1
    return count


def _add(wheel: Path, archive: tarfile.TarFile) -> None:
    with zipfile.ZipFile(wheel) as source:
        for entry in source.infolist():
            target = destination(entry.filename)
            if entry.is_dir() or target is None:
                continue
            info = tarfile.TarInfo(target)
            info.size = entry.file_size
            # Programs that packages bring, such as ptxas, must stay executable.
            info.mode = (entry.external_attr >> 16) & 0o755 | 0o644
            with source.open(entry) as data:
                archive.addfile(info, data)


def unpack(directory: Path, target: Path) -> None:
    """Unpack the pieces of `directory` under `target`."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as whole, tempfile.TemporaryFile() as plain:
        for piece in sorted(directory.glob("piece-*")):
            whole.write(piece.read_bytes())
        whole.seek(0)
        with lzma.open(whole) as packed:  # to its end, where the checksum is
            shutil.copyfileobj(packed, plain)
        plain.seek(0)
        with tarfile.open(fileobj=plain) as archive:
            archive.extractall(target, filter="data")  # refuses paths outside the target


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("pack", help="wheels to pieces")
    verb.add_argument("wheels", nargs="+", type=Path)
    verb.add_argument("--output", type=Path, required=True, help="new directory for the pieces")
    verb = verbs.add_parser("unpack", help="pieces to a directory for PYTHONPATH")
    verb.add_argument("pieces", type=Path)
    verb.add_argument("--target", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        if arguments.verb == "pack":
            print(f"{pack(arguments.wheels, arguments.output)} pieces in {arguments.output}")
        else:
            unpack(arguments.pieces, arguments.target)
    except (OSError, EOFError, ValueError, lzma.LZMAError, tarfile.TarError) as exc:
        sys.exit(f"error: {exc}")


if __name__ == "__main__":
    main()
