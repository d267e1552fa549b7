# SPDX-License-Identifier: MIT
"""Which intervals an operation on memory invalidates, and which requests the kernel is sure to refuse.

Pure functions of the request and of the vmas: what the kernel's own notifier calls cover. Where it cannot
be known beforehand whether the kernel will refuse, the interval counts as affected: too many invalidations
cost time, a missing one costs correctness.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Protocol

from .arguments import integer
from .errors import HasVmas, MirrorError
from .vma import Vma

PAGE_SIZE = 4096
HUGE_SIZE = 2 << 20
#: Where user addresses end (x86-64, 4-level page tables).
USER_END = 1 << 47

MADV_DONTNEED = 4
MADV_FREE = 8
MADV_REMOVE = 9
MADV_UNMERGEABLE = 13
MADV_HUGEPAGE = 14
MADV_PAGEOUT = 21
MADV_DONTNEED_LOCKED = 24
MADV_COLLAPSE = 25
MADV_HWPOISON = 100
MADV_SOFT_OFFLINE = 101
MADV_GUARD_INSTALL = 102

# Advice that takes pages out of the page table, or exchanges them.
_ZAPS = frozenset(
    (
        MADV_DONTNEED,
        MADV_FREE,
        MADV_REMOVE,
        MADV_UNMERGEABLE,
        MADV_PAGEOUT,
        MADV_DONTNEED_LOCKED,
        MADV_COLLAPSE,
        MADV_HWPOISON,
        MADV_SOFT_OFFLINE,
        MADV_GUARD_INSTALL,
    )
)

MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4

Interval = tuple[int, int]


def page_up(size: int, page: int = PAGE_SIZE) -> int:
    return -(-size // page) * page


def check_span(mm: HasVmas, what: str, addr: int, size: int, *, empty: bool = False) -> Interval:
    """[addr, addr + size), the size rounded up to pages as the kernel does. EINVAL where it is wrong."""
    addr, size = integer(what, "addr", addr), integer(what, "size", size)
    if addr % PAGE_SIZE:
        down, up = addr // PAGE_SIZE * PAGE_SIZE, page_up(addr)
        wrong = f"address {addr:#x} is not a multiple of the page size ({PAGE_SIZE})"
        hint = f"use {down:#x} or {up:#x}"
    elif size == 0 and not empty:
        wrong, hint = f"size 0 at {addr:#x}", "give a size in bytes, at least 1"
    elif size < 0 or addr < 0:
        wrong, hint = f"negative address or size: {addr}, {size}", "give an address and a size in bytes"
    elif addr + page_up(size) > USER_END:
        wrong = f"[{addr:#x}, {addr + size:#x}) is beyond the user address space (0-{USER_END:#x})"
        hint = "keep addr + size below its end"
    else:
        return addr, addr + page_up(size)
    raise invalid(mm, what, wrong, addr, hint)


def invalid(mm: HasVmas, what: str, wrong: str, addr: int, hint: str) -> MirrorError:
    """The EINVAL of a request that can be seen to be wrong."""
    return MirrorError(errno.EINVAL, f"{what}: {wrong}", addr=addr, vma=mm._vma_for_error(addr), hint=hint)


class HasHugetlb(HasVmas, Protocol):
    """An AddressSpace."""

    def _hugetlb_at(self, addr: int) -> Vma | None: ...


def check_huge_cuts(mm: HasHugetlb, what: str, start: int, end: int) -> None:
    """EINVAL where [start, end) would cut a huge page of hugetlb memory: it cannot be split."""
    for addr in (start, end):
        vma = mm._hugetlb_at(addr)
        if vma is None or addr == vma.start or addr % vma.page_size == 0:
            continue
        wrong = f"{addr:#x} is inside a huge page of hugetlb memory"
        raise invalid(mm, what, wrong, addr, f"give a multiple of {vma.page_size} as address and as size")


def protected(vmas: Iterable[Vma], start: int, end: int, prot: int) -> Iterator[Interval]:
    """What mprotect() changes: vma by vma up to the first hole, those that have another protection."""
    rwx = prot & 7
    at = start
    for vma in vmas:
        if vma.start > at:
            return
        at = vma.end
        if vma.prot != rwx:
            yield max(vma.start, start), min(vma.end, end)


def zaps(advice: int) -> bool:
    """Whether the advice changes the page table."""
    return advice in _ZAPS


# Advice after which private memory reads as zeroes, or as its file has it.
_DISCARDS = frozenset((MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_DONTNEED_LOCKED, MADV_GUARD_INSTALL))


def discards(advice: int) -> bool:
    """Whether the advice throws contents away."""
    return advice in _DISCARDS


def reapable(vmas: Iterable[Vma], start: int, end: int) -> Iterator[Interval]:
    """What the OOM reaper zaps of [start, end), vma by vma: private, not hugetlb, not a device's."""
    for vma in vmas:
        if not (vma.shared or vma.hugetlb or vma.special):
            yield max(vma.start, start), min(vma.end, end)


def advised(vmas: Iterable[Vma], start: int, end: int, advice: int) -> Iterator[Interval]:
    """What a zapping madvise() changes: vma by vma, holes left out, up to the first vma that refuses."""
    for vma in vmas:
        first, last = max(vma.start, start), min(vma.end, end)
        if _refuses(vma, first, advice):
            return
        if vma.hugetlb:
            last = last // vma.page_size * vma.page_size
        if first < last:
            yield first, last


def _refuses(vma: Vma, addr: int, advice: int) -> bool:
    if vma.hugetlb and advice in (MADV_DONTNEED, MADV_DONTNEED_LOCKED):
        return addr % vma.page_size != 0
    if vma.hugetlb and advice in (MADV_FREE, MADV_PAGEOUT, MADV_COLLAPSE, MADV_GUARD_INSTALL):
        return True
    if advice == MADV_REMOVE:
        return not vma.shared
    # A private mapping of /dev/zero has an inode and is anonymous all the same.
    return advice == MADV_FREE and (vma.shared or (vma.file and not vma.name.startswith("/dev/zero")))


def aliases(vmas: Iterable[Vma], holes: list[tuple[Vma, Interval]]) -> Iterator[Interval]:
    """Where else the file pages behind ``holes`` are mapped: MADV_REMOVE takes them out of every mapping."""
    for vma in vmas:
        for source, (start, end) in holes:
            if vma.inode != source.inode or vma.dev != source.dev or not vma.file:
                continue
            shift = (vma.start - vma.offset) - (source.start - source.offset)
            first, last = max(start + shift, vma.start), min(end + shift, vma.end)
            if first < last and (first, last) != (start, end):
                yield first, last


def check_mremap(
    mm: HasVmas, old: Interval, new_size: int, flags: int, new_addr: int | None
) -> tuple[int, int]:
    """EINVAL if flags, sizes and addresses do not go together; else the new size, rounded, and the target."""
    addr, size = old[0], old[1] - old[0]
    new_size, flags = integer("mremap", "new_size", new_size), integer("mremap", "flags", flags)
    fixed, dontunmap = flags & MREMAP_FIXED, flags & MREMAP_DONTUNMAP
    if flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP):
        wrong = f"flags {flags:#x} has bits beyond MREMAP_MAYMOVE, MREMAP_FIXED and MREMAP_DONTUNMAP"
        hint = "give these bits only"
    elif (fixed or dontunmap) and not flags & MREMAP_MAYMOVE:
        wrong = "MREMAP_FIXED and MREMAP_DONTUNMAP need MREMAP_MAYMOVE"
        hint = f"give flags={flags | MREMAP_MAYMOVE:#x}"
    elif bool(fixed) != (new_addr is not None):
        wrong = "MREMAP_FIXED needs new_addr, and new_addr needs it"
        hint = "give both, or none of them"
    elif new_size <= 0:
        wrong = f"new size {new_size}"
        hint = "give a size in bytes, at least 1; munmap() takes memory away"
    elif dontunmap and page_up(new_size) != size:
        wrong = f"MREMAP_DONTUNMAP cannot resize ({size} to {page_up(new_size)})"
        hint = "give the old size as the new one"
    else:
        if new_addr is None:
            return page_up(new_size), 0
        start, end = check_span(mm, "mremap", new_addr, new_size)
        if end <= old[0] or old[1] <= start:
            return end - start, start
        wrong = f"the target [{start:#x}, {end:#x}) overlaps the source [{addr:#x}, {old[1]:#x})"
        hint = "give a new_addr whose interval lies beside the old one"
    raise invalid(mm, "mremap", wrong, addr, hint)
