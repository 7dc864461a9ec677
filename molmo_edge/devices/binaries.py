"""Which GPU architectures a compiled library holds code for, read off its fat binaries.

A CUDA library carries its device code in the ELF section ``.nv_fatbin``: a row of containers, each
with entries of machine code (cubin) or PTX, and each entry's header names its architecture. Only
headers are read, so a 300 MB library takes milliseconds. Nothing is executed or imported.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
_CONTAINER = 0xBA55ED50
_PTX, _CUBIN = 1, 2
# Entry flags, as nvcc sets them for sm_90a and sm_120f.
_ARCH_SPECIFIC, _FAMILY = 1 << 20, 1 << 21
_MAX_ENTRIES = 1_000_000

# NVIDIA promises that machine code runs on later chips of its generation for desktop chips only:
# on a Jetson's chip, only code made for that very chip counts (CUDA C++ Programming Guide, binary
# compatibility).
_JETSON_CHIPS = ((7, 2), (8, 7), (11, 0))

Support = Literal["native", "ptx", "none"]


@dataclass(frozen=True, order=True)
class Code:
    """Device code of one kind: ``arch`` 120 is sm_120, ``suffix`` "", "a" (that chip only) or "f"
    (its family), ``ptx`` whether the driver must still compile it."""

    arch: int
    suffix: str
    ptx: bool

    def __str__(self) -> str:
        return f"{'compute' if self.ptx else 'sm'}_{self.arch}{self.suffix}"


@dataclass(frozen=True)
class Library:
    """One compiled library.

    Attributes:
        name: file name.
        code: device code to how many entries of it; empty for a library without any.
        cuda_major: of the CUDA runtime it is linked to, ``None`` if it names none.
    """

    name: str
    code: dict[Code, int]
    cuda_major: int | None

    def support(self, capability: tuple[int, int]) -> Support | None:
        """What this library has for a GPU: machine code, PTX only, or none.

        ``None`` for a library that holds no device code at all.
        """
        if not self.code:
            return None
        if any(_runs(code, capability) for code in self.code if not code.ptx):
            return "native"
        return "ptx" if any(_runs(code, capability) for code in self.code if code.ptx) else "none"


def scan(path: Path) -> Library | None:
    """The device code in a library; ``None`` when it is no readable 64-bit ELF file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            counts: dict[Code, int] = {}
            strings = b""
            for name, begin, size in _elf_sections(data):
                if name in _SECTIONS:
                    for code in _entries(data, begin, begin + size):
                        counts[code] = counts.get(code, 0) + 1
                elif name == b".dynstr":
                    strings = data[begin : begin + size]
            linked = re.search(rb"libcudart\.so\.(\d+)", strings)
            return Library(path.name, counts, int(linked[1]) if linked else None)
    except (OSError, ValueError, struct.error):
        return None


def _runs(code: Code, capability: tuple[int, int]) -> bool:
    major, minor = divmod(code.arch, 10)
    if code.suffix == "a":
        return (major, minor) == capability
    if code.ptx and not code.suffix:
        return (major, minor) <= capability
    if (major, minor) in _JETSON_CHIPS or capability in _JETSON_CHIPS:
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


def _elf_sections(data: mmap.mmap) -> Iterator[tuple[bytes, int, int]]:
    if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":  # 64-bit, little-endian
        raise ValueError("not an ELF file this can read")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count, names = struct.unpack_from("<HHH", data, 0x3A)
    if table + count * entry > len(data):
        raise ValueError("the section table lies behind the end")
    headers = []
    for index in range(count):
        name, _, _, _, offset, size = struct.unpack_from("<IIQQQQ", data, table + index * entry)
        headers.append((name, offset, size))
    if names >= len(headers):
        return
    base, length = headers[names][1], headers[names][2]
    if base + length > len(data):  # offsets have 64 bits, which `find` does not take
        return
    for name, offset, size in headers:
        end = data.find(b"\0", base + name, base + length)
        if end >= 0 and offset + size <= len(data):
            yield data[base + name : end], offset, size


def _entries(data: mmap.mmap, position: int, end: int) -> Iterator[Code]:
    budget = _MAX_ENTRIES
    while position + 16 <= end and budget > 0:
        budget -= 1
        magic, _, header, size = struct.unpack_from("<IHHQ", data, position)
        if magic != _CONTAINER or header < 16:
            position += 8  # containers are aligned to 8 bytes, with padding between them
            continue
        entry, stop = position + header, min(position + header + size, end)
        while entry + 48 <= stop:
            kind, _, own, body = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            (flags,) = struct.unpack_from("<Q", data, entry + 40)
            if own < 48:
                break
            if kind in (_PTX, _CUBIN):
                suffix = "a" if flags & _ARCH_SPECIFIC else "f" if flags & _FAMILY else ""
                yield Code(arch, suffix, kind == _PTX)
            entry += own + body
        position = stop + (-stop % 8)
