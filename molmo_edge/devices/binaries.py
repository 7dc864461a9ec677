"""Read which GPU architectures a compiled library holds code for.

Only the entry headers of the ELF section ``.nv_fatbin`` are read; nothing is executed.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_CONTAINER, _PTX, _CUBIN = 0xBA55ED50, 1, 2
_SUFFIXES = ((1 << 20, "a"), (1 << 21, "f"))  # entry flags, as nvcc sets them
# Machine code runs on later chips of its generation on desktops only: on a Jetson's chip, only code
# for that very chip counts (CUDA C++ Programming Guide, binary compatibility).
_JETSON_CHIPS = ((7, 2), (8, 7), (11, 0))


@dataclass(frozen=True, order=True)
class Code:
    """Kind of device code; ``suffix`` "a" means that chip only, "f" its family."""

    arch: int
    suffix: str
    ptx: bool

    def __str__(self) -> str:
        return f"{'compute' if self.ptx else 'sm'}_{self.arch}{self.suffix}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        own = divmod(self.arch, 10)
        if self.ptx and not self.suffix:
            return own <= capability
        if self.suffix == "a" or own in _JETSON_CHIPS or capability in _JETSON_CHIPS:
            return own == capability
        return own[0] == capability[0] and own[1] <= capability[1]


@dataclass(frozen=True)
class Library:
    """One compiled library: entries of each kind of code, and the CUDA version it links to."""

    name: str
    code: Mapping[Code, int]
    cuda_major: int | None

    def support(self, capability: tuple[int, int]) -> str | None:
        """Return "native", "ptx" or "none"; ``None`` for a library without device code."""
        kinds = {code.ptx for code in self.code if code.runs_on(capability)}
        return ("native" if False in kinds else "ptx" if kinds else "none") if self.code else None


def scan(path: Path) -> Library | None:
    """Read the device code of a library; ``None`` when it is no readable 64-bit ELF file."""
    code: Counter[Code] = Counter()
    cuda = None
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for name, begin, end in _sections(data):
                if name in (b".nv_fatbin", b"__nv_relfatbin"):
                    code.update(_entries(data, begin, end))
                elif name == b".dynstr":
                    cuda = re.search(rb"libcudart\.so\.(\d+)", data[begin:end]) or cuda
    except (OSError, ValueError, struct.error):
        return None
    return Library(path.name, code, None if cuda is None else int(cuda[1]))


def _sections(data: mmap.mmap) -> Iterator[tuple[bytes, int, int]]:
    table, size, count, names = struct.unpack_from("<Q10xHHH", data, 0x28)
    if data[:6] != b"\x7fELF\x02\x01" or size < 64 or table + count * size > len(data):
        raise ValueError("not a 64-bit little-endian ELF file")
    headers = [struct.unpack_from("<I20xQQ", data, table + i * size) for i in range(count)]
    base, length = headers[names][1:] if names < count else (len(data), 0)
    for name, offset, extent in headers:  # offsets have 64 bits, which `find` does not take
        end = data.find(b"\0", base + name, base + length) if base + length <= len(data) else -1
        if end >= 0 and offset + extent <= len(data):
            yield data[base + name : end], offset, offset + extent


def _entries(data: mmap.mmap, position: int, end: int) -> Iterator[Code]:
    for _ in range(1_000_000):  # bounds the time that a damaged file takes
        if position + 16 > end:
            return
        magic, header, size = struct.unpack_from("<I2xHQ", data, position)
        if magic != _CONTAINER or header < 16:
            position += 8  # containers are aligned to 8 bytes, with padding between them
            continue
        entry, stop = position + header, min(position + header + size, end)
        while entry + 48 <= stop:
            kind, own, body, arch, flags = struct.unpack_from("<H2xIQ12xI8xQ", data, entry)
            if kind in (_PTX, _CUBIN):
                suffix = next((name for flag, name in _SUFFIXES if flags & flag), "")
                yield Code(arch, suffix, kind == _PTX)
            entry += max(own, 48) + body
        position = stop + (-stop % 8)
