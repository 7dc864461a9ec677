"""Wheels through pieces and back."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pack_wheels
import pytest

SO = os.urandom(200_000)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "small_vllm-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small_vllm/__init__.py", "VALUE = 41 + 1\n")
        archive.writestr("small_vllm/kernels.bin", SO)
        archive.writestr("small_vllm/broken.py", "import does_not_exist\n")
        tool = zipfile.ZipInfo("small_vllm/ptxas")
        tool.external_attr = 0o755 << 16
        archive.writestr(tool, "#!/bin/sh\n")
        archive.writestr("vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", b"x" * 1000)
        archive.writestr("small_vllm-1.0.data/purelib/small_more.py", "MORE = 1\n")
        archive.writestr("small_vllm-1.0.data/scripts/small", "#!/bin/sh\n")
        archive.writestr("small_vllm-1.0.dist-info/METADATA", "Name: small_vllm\nVersion: 1.0\n")
    return path


def packed(wheel: Path, directory: Path) -> Path:
    pack_wheels.pack([wheel], directory, piece_bytes=30_000)
    return directory


def test_pieces_are_small_and_bring_back_what_was_packed(wheel: Path, tmp_path: Path) -> None:
    parts = packed(wheel, tmp_path / "parts")
    pieces = sorted(parts.glob("piece-*"))
    assert len(pieces) > 5
    assert all(piece.stat().st_size <= 30_000 for piece in pieces)
    pack_wheels.unpack(parts, tmp_path / "site")
    site = tmp_path / "site"
    assert (site / "small_vllm" / "kernels.bin").read_bytes() == SO
    assert os.access(site / "small_vllm" / "ptxas", os.X_OK)
    assert (site / "small_more.py").is_file()
    assert (site / "small_vllm-1.0.dist-info" / "METADATA").is_file()


def test_what_is_not_needed_stays_out_and_is_counted(wheel: Path, tmp_path: Path) -> None:
    parts = packed(wheel, tmp_path / "parts")
    manifest = json.loads((parts / "manifest.json").read_text())
    assert manifest["left_out_bytes"] == 1000
    pack_wheels.unpack(parts, tmp_path / "site")
    assert not list((tmp_path / "site").rglob("*fa2*"))
    assert not list((tmp_path / "site").rglob("scripts"))


def test_what_imports_is_separated_from_what_does_not(wheel: Path, tmp_path: Path) -> None:
    pack_wheels.unpack(packed(wheel, tmp_path / "parts"), tmp_path / "site")
    errors = pack_wheels.check(tmp_path / "site", ["small_vllm", "small_vllm.broken"])
    assert errors["small_vllm"] is None
    assert "does_not_exist" in (errors["small_vllm.broken"] or "")
    with pytest.raises(pack_wheels.PackError, match="from elsewhere"):
        pack_wheels.check(tmp_path / "site", ["json.decoder"])


def test_a_damaged_or_missing_piece_is_noticed(wheel: Path, tmp_path: Path) -> None:
    parts = packed(wheel, tmp_path / "parts")
    piece = parts / "piece-002"
    data = bytearray(piece.read_bytes())
    data[10] ^= 1
    piece.write_bytes(data)
    with pytest.raises(pack_wheels.PackError, match="differs from what"):
        pack_wheels.unpack(parts, tmp_path / "site")
    piece.unlink()
    with pytest.raises(pack_wheels.PackError, match="missing"):
        pack_wheels.unpack(parts, tmp_path / "site")


def test_a_directory_in_use_and_a_path_that_leaves_the_wheel_are_refused(
    wheel: Path, tmp_path: Path
) -> None:
    with pytest.raises(pack_wheels.PackError, match="not empty"):
        pack_wheels.pack([wheel], wheel.parent)
    evil = tmp_path / "evil.whl"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../outside.py", "")
    with pytest.raises(pack_wheels.PackError, match="outside"):
        pack_wheels.pack([evil], tmp_path / "other")


@pytest.mark.parametrize(
    ("path", "out"),
    [
        ("vllm/_C_stable_libtorch.abi3.so", False),
        ("vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", True),
        ("vllm/vllm_flash_attn/flash_attn_interface.py", False),
        ("vllm/third_party/deep_gemm/include/cute/a.hpp", True),
        ("vllm/model_executor/models/molmo.py", False),
    ],
)
def test_the_list_of_what_stays_out(path: str, out: bool) -> None:
    assert pack_wheels.is_dropped(path) is out
