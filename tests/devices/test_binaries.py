"""What a library holds for a GPU is read off its headers, as NVIDIA's compatibility rules say."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_edge.devices.binaries import Library, scan

CUBIN, PTX = 2, 1
PLAIN, SPECIFIC, FAMILY = 0x8011, 0x108011, 0x1208011  # flags seen in vLLM's own wheels

Entry = tuple[int, int, int]  # kind, architecture, flags

# As in vLLM 0.32's aarch64 and x86-64 wheels and their FlashAttention 2 and 3.
AARCH64: list[Entry] = [(CUBIN, 87, PLAIN), (CUBIN, 90, PLAIN), (CUBIN, 110, PLAIN),
                        (CUBIN, 110, FAMILY), (CUBIN, 120, FAMILY), (PTX, 80, PLAIN)]  # fmt: skip
X86: list[Entry] = [(CUBIN, 80, PLAIN), (CUBIN, 86, PLAIN), (CUBIN, 89, PLAIN),
                    (CUBIN, 120, PLAIN), (PTX, 90, PLAIN)]  # fmt: skip
FLASH_2: list[Entry] = [(CUBIN, 80, PLAIN), (PTX, 80, PLAIN)]
FLASH_3: list[Entry] = [(CUBIN, 90, SPECIFIC)]


def fat_binary(entries: Sequence[Entry]) -> bytes:
    """A container as nvcc lays it out, with 40 bytes of code in each entry."""
    body = b""
    for kind, arch, flags in entries:
        header = struct.pack("<HHIQ", kind, 0x101, 64, 40).ljust(28, b"\0")
        header = (header + struct.pack("<I", arch)).ljust(40, b"\0") + struct.pack("<Q", flags)
        body += header.ljust(64, b"\0") + b"\x7f" * 40
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(path: Path, *containers: Sequence[Entry], links: bytes = b"libcudart.so.13") -> Library:
    """Scan a file with these containers, text before and padding between them."""
    code = b"".join(fat_binary(entries) + bytes(24) for entries in containers)
    path.write_bytes(b"\x7fELF" + bytes(100) + links + bytes(100) + code)
    scanned = scan(path)
    assert scanned is not None
    return scanned


@pytest.mark.parametrize(
    ("entries", "capability", "support"),
    [
        (AARCH64, (11, 0), "native"),
        (AARCH64, (8, 7), "native"),
        (AARCH64, (12, 1), "native"),  # sm_120f: the family includes GB10
        (X86, (12, 0), "native"),
        (X86, (11, 0), "ptx"),  # a desktop wheel on a Thor
        (X86, (8, 7), "none"),  # and on an Orin, for which its PTX is too new
        (FLASH_2, (11, 0), "ptx"),
        (FLASH_2, (8, 6), "native"),
        (FLASH_2, (8, 7), "ptx"),  # machine code of another chip counts for nothing on a Jetson
        (FLASH_3, (9, 0), "native"),
        (FLASH_3, (10, 0), "none"),
        ([(CUBIN, 87, PLAIN)], (8, 9), "none"),
        ([(CUBIN, 120, SPECIFIC)], (12, 1), "none"),  # sm_120a is that chip alone
        ([(CUBIN, 86, PLAIN)], (8, 0), "none"),
    ],
)
def test_support(
    tmp_path: Path, entries: list[Entry], capability: tuple[int, int], support: str
) -> None:
    assert library(tmp_path / "x.so", entries).support(capability) == support


def test_architectures_of_all_containers_and_the_cuda_runtime(tmp_path: Path) -> None:
    built = library(tmp_path / "_C.abi3.so", AARCH64, FLASH_2, FLASH_3)
    assert (built.name, built.cuda_major) == ("_C.abi3.so", 13)
    assert {str(code) for code in built.code} == {
        "sm_80", "sm_87", "sm_90", "sm_90a", "sm_110", "sm_110f", "sm_120f", "compute_80",
    }  # fmt: skip
    assert library(tmp_path / "b.so", links=b"libc.so.6") == Library("b.so", frozenset(), None)
    (tmp_path / "empty.so").touch()
    assert scan(tmp_path / "empty.so") is scan(tmp_path / "missing.so") is scan(tmp_path) is None


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_damaged_libraries_neither_crash_nor_hang(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.so"
    content = bytearray(fat_binary(AARCH64) + fat_binary(FLASH_2))
    for _ in range(data.draw(st.integers(1, 8))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    scanned = scan(path)
    assert scanned is not None and len(scanned.code) <= len(AARCH64 + FLASH_2)
