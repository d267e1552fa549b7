"""What the kernel itself says of a range of pages, read without the rest of the library.

A replayed snapshot that differs from its recording may be the library's mistake or the host's own doing: only
the page table can tell. This module reads it raw (/proc/self/pagemap, the PAGEMAP_SCAN ioctl and, as root,
/proc/kpageflags), so that the answer does not come from the code in question.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass
from itertools import groupby

PROT_ERROR = 0xFF
PROT_PMD = 0x04
PROT_ZERO = 0x10
_PROT_ACCESS = 0x03

_PAGE = 4096
_PFN_MASK = (1 << 55) - 1
_PM_UFFD_WP = 1 << 57
_PM_EXCLUSIVE = 1 << 56
_PM_FILE = 1 << 61
_PM_SWAP = 1 << 62
_PM_PRESENT = 1 << 63

_PAGEMAP_SCAN = 0xC0606610
_SCAN_ARG = struct.Struct("=12Q")
_REGION = struct.Struct("=3Q")
_SCAN_ZERO = 1 << 5
_SCAN_HUGE = 1 << 6
_SCAN_CATEGORIES = 0xFF

_KPF_ZERO_PAGE = 1 << 24


@dataclass(frozen=True, slots=True)
class RawPage:
    """One page as the page table has it; `pfn` is 0 where the reader may not see it."""

    present: bool
    swapped: bool
    file: bool
    exclusive: bool
    uffd_wp: bool
    zero: bool
    huge: bool
    pfn: int

    def __str__(self) -> str:
        if not self.present:
            return "swapped" if self.swapped else "absent"
        names = ("zero", "huge", "file", "exclusive", "uffd_wp")
        return " ".join(["present", *(name for name in names if getattr(self, name))])

    @property
    def shape(self) -> tuple[bool, bool, bool]:
        """What a snapshot byte and a page table can both tell: present, the zero page, PMD-mapped."""
        return self.present, self.present and self.zero and not self.huge, self.present and self.huge


def prot_shape(byte: int) -> tuple[bool, bool, bool]:
    """What a snapshot byte says of the page table: present, the zero page, PMD-mapped."""
    if byte == PROT_ERROR:
        return False, False, False
    return bool(byte & _PROT_ACCESS), bool(byte & PROT_ZERO), bool(byte & PROT_PMD)


def read_pages(addr: int, npages: int) -> list[RawPage]:
    """The entries of npages pages from addr, as pagemap, PAGEMAP_SCAN and kpageflags show them."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = os.pread(fd, npages * 8, addr >> 9)
        categories = _scan(fd, addr, npages)
    finally:
        os.close(fd)
    entries = struct.unpack(f"={npages}Q", raw)
    return [_page(entry, category) for entry, category in zip(entries, categories, strict=True)]


def _page(entry: int, categories: int) -> RawPage:
    present = bool(entry & _PM_PRESENT)
    pfn = entry & _PFN_MASK if present else 0
    return RawPage(
        present=present,
        swapped=bool(entry & _PM_SWAP),
        file=bool(entry & _PM_FILE),
        exclusive=bool(entry & _PM_EXCLUSIVE),
        uffd_wp=bool(entry & _PM_UFFD_WP),
        zero=bool(categories & _SCAN_ZERO) or _is_zero_page(pfn),
        huge=bool(categories & _SCAN_HUGE),
        pfn=pfn,
    )


def _scan(fd: int, addr: int, npages: int) -> list[int]:
    """PAGEMAP_SCAN's categories of each page."""
    regions = ctypes.create_string_buffer(_REGION.size * npages)
    end = addr + npages * _PAGE
    arg = _SCAN_ARG.pack(
        _SCAN_ARG.size, 0, addr, end, 0, ctypes.addressof(regions), npages, 0, 0, 0, 0, _SCAN_CATEGORIES
    )
    found = fcntl.ioctl(fd, _PAGEMAP_SCAN, bytearray(arg))
    categories = [0] * npages
    for index in range(found):
        start, stop, category = _REGION.unpack_from(regions, index * _REGION.size)
        for page in range((start - addr) // _PAGE, (stop - addr) // _PAGE):
            categories[page] = category
    return categories


def _is_zero_page(pfn: int) -> bool:
    """Whether kpageflags calls the page a zero page, the huge one included; False where it cannot be read."""
    if pfn == 0:
        return False
    try:
        with open("/proc/kpageflags", "rb", buffering=0) as flags:
            flags.seek(pfn * 8)
            raw = flags.read(8)
    except OSError:
        return False
    return len(raw) == 8 and bool(struct.unpack("=Q", raw)[0] & _KPF_ZERO_PAGE)


def shown_by_page_table(recorded: bytes, got: bytes, pages: list[RawPage]) -> bool:
    """Whether the page table itself is what differs from the recording, in every page where a snapshot does.

    True only if each such byte has another shape (present, zero page, PMD-mapped) in the recording than in
    the page table, and the snapshot reports the page table's.
    """
    differing = [i for i, (was, now) in enumerate(zip(recorded, got, strict=True)) if was != now]
    return bool(differing) and all(
        prot_shape(got[i]) == pages[i].shape and prot_shape(recorded[i]) != pages[i].shape for i in differing
    )


def describe(pages: list[RawPage]) -> list[str]:
    """Runs of pages that look alike, a line each."""
    lines = []
    first = 0
    for text, run in groupby(str(page) for page in pages):
        count = len(list(run))
        lines.append(f"pages {first}..{first + count - 1}: {text}, pfn {pages[first].pfn:#x}")
        first += count
    return lines
