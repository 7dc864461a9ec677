"""Writes small ELF libraries with fat binaries in them, as nvcc lays them out."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

CUBIN, PTX = 2, 1
PLAIN, SPECIFIC, FAMILY = 0x8011, 0x108011, 0x1208011  # flags seen in vLLM's own wheels

Entry = tuple[int, int, int]  # kind, architecture, flags


def fat_binary(entries: Sequence[Entry]) -> bytes:
    """One container with an entry for each, 40 bytes of code each."""
    body = b""
    for kind, arch, flags in entries:
        header = struct.pack("<HHIQ", kind, 0x101, 64, 40)  # kind, version, header, body
        header = header.ljust(28, b"\0") + struct.pack("<I", arch)
        body += (header.ljust(40, b"\0") + struct.pack("<Q", flags)).ljust(64, b"\0")
        body += b"\x7f" * 40
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(containers: Sequence[bytes], strings: bytes = b"\0libcudart.so.13\0") -> bytes:
    """A 64-bit little-endian ELF file with the sections a scanner looks at."""
    names = b"\0.dynstr\0.nv_fatbin\0.shstrtab\0"
    fat = b"".join(container.ljust(-(-len(container) // 8) * 8, b"\0") for container in containers)
    sections = [(b"", b""), (b".dynstr", strings), (b".nv_fatbin", fat), (b".shstrtab", names)]
    position, data, table = 64, b"", b""
    for name, content in sections:
        offset = names.index(name) if name else 0
        table += struct.pack("<IIQQQQIIQQ", offset, 1, 0, 0, position, len(content), 0, 0, 1, 0)
        data += content.ljust(-(-len(content) // 8) * 8, b"\0")
        position = 64 + len(data)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, position, 0, 64, 0, 0, 64, 4, 3)
    return header + data + table


def write_library(path: Path, *groups: Sequence[Entry], strings: bytes | None = None) -> Path:
    containers = [fat_binary(group) for group in groups]
    content = library(containers) if strings is None else library(containers, strings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
