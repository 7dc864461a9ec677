"""What a library holds for a GPU is read off its headers, as NVIDIA's compatibility rules say."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_edge.devices.binaries import Code, scan
from tests.devices.elf import CUBIN, FAMILY, PLAIN, PTX, SPECIFIC, Entry, write_library

# As in vLLM 0.32's aarch64 and x86-64 wheels and their FlashAttention 2 and 3.
AARCH64: list[Entry] = [(CUBIN, 87, PLAIN), (CUBIN, 90, PLAIN), (CUBIN, 110, PLAIN),
                        (CUBIN, 110, FAMILY), (CUBIN, 120, FAMILY), (PTX, 80, PLAIN)]  # fmt: skip
X86: list[Entry] = [(CUBIN, 80, PLAIN), (CUBIN, 86, PLAIN), (CUBIN, 89, PLAIN),
                    (CUBIN, 120, PLAIN), (PTX, 90, PLAIN)]  # fmt: skip
FLASH_2: list[Entry] = [(CUBIN, 80, PLAIN), (PTX, 80, PLAIN)]
FLASH_3: list[Entry] = [(CUBIN, 90, SPECIFIC)]


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
        (FLASH_2, (12, 0), "ptx"),
        (FLASH_2, (8, 6), "native"),
        (FLASH_2, (8, 7), "ptx"),  # machine code of another chip counts for nothing on a Jetson
        (FLASH_3, (9, 0), "native"),
        (FLASH_3, (10, 0), "none"),
        ([(CUBIN, 87, PLAIN)], (8, 9), "none"),
        ([(CUBIN, 120, SPECIFIC)], (12, 1), "none"),  # sm_120a is that chip alone
        ([(CUBIN, 86, PLAIN)], (8, 0), "none"),
        ([], (12, 0), None),
    ],
)
def test_support(
    tmp_path: Path, entries: list[Entry], capability: tuple[int, int], support: str | None
) -> None:
    found = scan(write_library(tmp_path / "x.so", entries))
    assert found is not None
    assert found.support(capability) == support


def test_counts_by_architecture_over_several_containers(tmp_path: Path) -> None:
    path = write_library(tmp_path / "_C.abi3.so", AARCH64, FLASH_2, FLASH_3)
    found = scan(path)
    assert found is not None and found.name == "_C.abi3.so"
    assert found.code[Code(110, "", False)] == 1
    assert found.code[Code(80, "", True)] == 2
    assert {str(code) for code in found.code} == {
        "sm_80", "sm_87", "sm_90", "sm_90a", "sm_110", "sm_110f", "sm_120f", "compute_80",
    }  # fmt: skip


def test_linked_cuda_runtime(tmp_path: Path) -> None:
    found = scan(write_library(tmp_path / "a.so", AARCH64))
    assert found is not None and found.cuda_major == 13
    plain = scan(write_library(tmp_path / "b.so", AARCH64, strings=b"\0libc.so.6\0"))
    assert plain is not None and plain.cuda_major is None


def test_a_library_without_gpu_code_has_none() -> None:
    import _ctypes

    found = scan(Path(_ctypes.__file__))
    assert found is not None and found.code == {}


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"MZ" * 100, b"\x7fELF\x01\x01" + b"\0" * 99])
def test_what_is_no_elf_file_is_unknown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(content)
    assert scan(path) is None
    assert scan(tmp_path / "missing.so") is None
    assert scan(tmp_path) is None


def test_offsets_of_64_bits_behind_the_end_are_no_crash(tmp_path: Path) -> None:
    path = write_library(tmp_path / "x.so", AARCH64)
    content = bytearray(path.read_bytes())
    (table,) = struct.unpack_from("<Q", content, 0x28)
    struct.pack_into("<Q", content, table + 3 * 64 + 24, 2**64 - 1)  # the names' own section
    path.write_bytes(content)
    found = scan(path)
    assert found is not None and found.code == {}
    struct.pack_into("<Q", content, 0x28, 2**64 - 8)
    path.write_bytes(content)
    assert scan(path) is None


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_damaged_libraries_neither_crash_nor_hang(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("elf") / "x.so"
    content = bytearray(write_library(path, AARCH64, FLASH_2).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    found = scan(path)
    # Each section once, each entry once: at most this many steps.
    most = len(content) // 64 * (len(content) // 48)
    assert found is None or sum(found.code.values()) <= most
