"""Read which GPU architectures a compiled library holds code for; nothing is executed."""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Start of a container of device code as nvcc embeds it: magic, version 1, header of 16 bytes.
_CONTAINER = struct.pack("<IHH", 0xBA55ED50, 1, 16)
_PTX, _CUBIN = 1, 2
_SUFFIXES = ((1 << 20, "a"), (1 << 21, "f"))  # entry flags, as nvcc sets them
# Machine code runs on later chips of its generation on desktops only: on a Jetson's chip, only code
# for that very chip counts (CUDA C++ Programming Guide, binary compatibility).
_JETSON_CHIPS = ((7, 2), (8, 7), (11, 0))


@dataclass(frozen=True)
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
    """One compiled library: its kinds of device code, and the CUDA version it links to."""

    name: str
    code: frozenset[Code]
    cuda_major: int | None

    def support(self, capability: tuple[int, int]) -> Literal["native", "ptx", "none"]:
        """What a GPU finds in it: machine code, PTX for the driver to compile, or nothing."""
        kinds = {code.ptx for code in self.code if code.runs_on(capability)}
        return "native" if False in kinds else "ptx" if kinds else "none"


def scan(path: Path) -> Library | None:
    """Read the device code of a library; ``None`` when the file cannot be read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cuda = re.search(rb"libcudart\.so\.(\d+)", data)
            major = None if cuda is None else int(cuda[1])
            return Library(path.name, frozenset(_entries(data)), major)
    except (OSError, ValueError):
        return None


def _entries(data: mmap.mmap) -> Iterator[Code]:
    """Kinds of the entries of all containers, from one header to the next."""
    position = data.find(_CONTAINER)
    while 0 <= position <= len(data) - 16:
        (size,) = struct.unpack_from("<Q", data, position + 8)
        entry, stop = position + 16, min(position + 16 + size, len(data))
        while entry + 48 <= stop:
            kind, header, body, arch, flags = struct.unpack_from("<H2xIQ12xI8xQ", data, entry)
            if kind in (_PTX, _CUBIN):
                suffix = next((name for flag, name in _SUFFIXES if flags & flag), "")
                yield Code(arch, suffix, kind == _PTX)
            entry += max(header, 48) + body
        position = data.find(_CONTAINER, stop)
