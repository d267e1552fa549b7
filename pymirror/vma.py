# SPDX-License-Identifier: MIT
"""One vma of the process, as the kernel shows it."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ._shim import ffi, lib
from .errors import check

# Looked up once: of a library each look costs as much as the test.
_SHARED, _HUGETLB = lib.PM_VMA_SHARED, lib.PM_VMA_HUGETLB
_FILE, _SPECIAL = lib.PM_VMA_FILE, lib.PM_VMA_SPECIAL
_BITS = (
    (lib.PM_VMA_READ, mmap.PROT_READ),
    (lib.PM_VMA_WRITE, mmap.PROT_WRITE),
    (lib.PM_VMA_EXEC, mmap.PROT_EXEC),
)
_RWX = sum(bit for bit, _ in _BITS)
_PROT = [sum(prot for bit, prot in _BITS if flags & bit) for flags in range(_RWX + 1)]


@dataclass(frozen=True, slots=True)
class Vma:
    """A virtual memory area [start, end), bytes. ``str()`` is its line in /proc/PID/maps.

    ``prot`` is PROT_* bits as mmap(2) has them. ``file``: it has an inode, as files, memfds and shared
    anonymous memory do. ``special``: a device's or the kernel's own pages (VM_IO, VM_PFNMAP). ``page_size``
    is bytes, 2 MiB on hugetlb. ``offset`` is bytes in the file, ``dev`` (major, minor).
    """

    start: int
    end: int
    prot: int
    shared: bool
    hugetlb: bool
    file: bool
    special: bool
    page_size: int
    offset: int
    inode: int
    dev: tuple[int, int]
    name: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    def __contains__(self, addr: int) -> bool:
        return self.start <= addr < self.end

    def __str__(self) -> str:
        major, minor = self.dev
        line = (
            f"{self.start:x}-{self.end:x} {prot_text(self.prot)}{'s' if self.shared else 'p'}"
            f" {self.offset:08x} {major:02x}:{minor:02x} {self.inode} {self.name}"
        )
        return line.rstrip()


def prot_text(prot: int) -> str:
    """``rw-`` for PROT_READ | PROT_WRITE."""
    bits = ((mmap.PROT_READ, "r"), (mmap.PROT_WRITE, "w"), (mmap.PROT_EXEC, "x"))
    return "".join(letter if prot & bit else "-" for bit, letter in bits)


def find_vma(native: Any, addr: int) -> Vma | None:
    """The vma that holds addr, or the next above it, or None: the kernel's find_vma()."""
    found = ffi.new("struct pm_vma *")
    ret = lib.pm_vma_find(native, addr, found)
    if ret == -errno.ENOENT:
        return None
    check(ret, "find_vma")
    return _vma(found)


def any_vma(native: Any, start: int, end: int) -> bool:
    """Whether something of [start, end) is mapped."""
    found = ffi.new("struct pm_vma *")
    ret = lib.pm_vma_find(native, start, found)
    if ret == -errno.ENOENT:
        return False
    check(ret, "find_vma")
    return bool(found.start < end)


def hugetlb_vma(native: Any, addr: int) -> Vma | None:
    """The vma that holds addr if it is of hugetlb memory, else None, also if none can be had."""
    found = ffi.new("struct pm_vma *")
    if lib.pm_vma_find(native, addr, found) or found.start > addr or not found.flags & _HUGETLB:
        return None
    return _vma(found)


def walk_vmas(native: Any, start: int, end: int) -> Iterator[Vma]:
    """The vmas that overlap [start, end), in order: looked up one by one, so it may change under the walk."""
    addr = start
    while addr < end:
        vma = find_vma(native, addr)
        if vma is None or vma.start >= end:
            return
        yield vma
        addr = vma.end


def _vma(raw: Any) -> Vma:
    flags = raw.flags
    return Vma(
        start=raw.start,
        end=raw.end,
        prot=_PROT[flags & _RWX],
        shared=bool(flags & _SHARED),
        hugetlb=bool(flags & _HUGETLB),
        file=bool(flags & _FILE),
        special=bool(flags & _SPECIAL),
        page_size=raw.page_size,
        offset=raw.offset,
        inode=raw.inode,
        dev=(raw.dev_major, raw.dev_minor),
        name=ffi.string(raw.name).decode(errors="surrogateescape"),
    )
