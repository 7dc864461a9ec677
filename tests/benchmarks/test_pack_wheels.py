"""Wheels through pieces and back."""

from __future__ import annotations

import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pack_wheels
import pytest

KERNELS = os.urandom(200_000)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A small wheel, packed."""
    path, parts = tmp_path / "small_vllm-1.0-py3-none-any.whl", tmp_path / "parts"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small_vllm/kernels.bin", KERNELS)
        tool = zipfile.ZipInfo("small_vllm/ptxas")
        tool.external_attr = 0o755 << 16
        archive.writestr(tool, "#!/bin/sh\n")
        archive.writestr("vllm/_C_stable_libtorch.abi3.so", b"x")
        archive.writestr("vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", b"x")
        archive.writestr("vllm/third_party/deep_gemm/include/cute/a.hpp", b"x")
        archive.writestr("small_vllm-1.0.data/purelib/small_more.py", "MORE = 1\n")
        archive.writestr("small_vllm-1.0.data/scripts/small", "#!/bin/sh\n")
        archive.writestr("small_vllm-1.0.dist-info/METADATA", "Name: small_vllm\nVersion: 1.0\n")
    pack_wheels.pack([path], parts, piece_bytes=30_000)
    return parts


def test_small_pieces_bring_back_what_is_needed(parts: Path, tmp_path: Path) -> None:
    pieces = list(parts.iterdir())
    assert len(pieces) > 5 and all(piece.stat().st_size <= 30_000 for piece in pieces)
    site = tmp_path / "site"
    pack_wheels.unpack(parts, site)
    assert (site / "small_vllm" / "kernels.bin").read_bytes() == KERNELS
    assert os.access(site / "small_vllm" / "ptxas", os.X_OK)
    assert {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()} == {
        "small_vllm/kernels.bin",
        "small_vllm/ptxas",
        "small_more.py",
        "small_vllm-1.0.dist-info/METADATA",
        "vllm/_C_stable_libtorch.abi3.so",
    }


def test_a_damaged_or_missing_piece_is_noticed(parts: Path, tmp_path: Path) -> None:
    piece = parts / "piece-002"
    data = bytearray(piece.read_bytes())
    data[10] ^= 1
    for damage in (lambda: piece.write_bytes(data), piece.unlink):
        damage()
        with pytest.raises((lzma.LZMAError, tarfile.TarError)):
            pack_wheels.unpack(parts, tmp_path / "site")


def test_a_directory_in_use_and_a_path_that_leaves_the_wheel_are_refused(tmp_path: Path) -> None:
    evil = tmp_path / "evil.whl"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../outside.py", "")
    with pytest.raises(ValueError, match="not empty"):
        pack_wheels.pack([evil], tmp_path)
    pack_wheels.pack([evil], tmp_path / "parts")
    with pytest.raises(tarfile.OutsideDestinationError):
        pack_wheels.unpack(tmp_path / "parts", tmp_path / "site")
