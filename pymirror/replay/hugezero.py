# SPDX-License-Identifier: MIT
"""What the recorded kernel does at a write to the huge zero page, done here before the write.

Linux 6.12 splits it into zero pages of 4 KiB, of which the one that is written is replaced; newer kernels put
a huge page in its place. What a scenario goes on with would be other memory then.
"""

from __future__ import annotations

import ctypes
import os
from mmap import PROT_READ, PROT_WRITE

from ..mm import AddressSpace
from ..vma import find_vma
from .evidence import read_pages

_PAGE = 4096
_HUGE = 2 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def split_huge_zero_pages(mm: AddressSpace, start: int, end: int) -> None:
    """Map what is mapped by the huge zero page in [start, end) by the small one, page by page."""
    for addr in range(start // _HUGE * _HUGE, end, _HUGE):
        first = read_pages(max(addr, start), 1)[0]
        vma = find_vma(mm.native, max(addr, start))
        if first.huge and first.zero and vma is not None and vma.prot & PROT_WRITE:
            with mm.invalidate(addr, addr + _HUGE):
                _protect(addr, PROT_READ)
                _protect(addr, PROT_READ | PROT_WRITE)


def _protect(addr: int, prot: int) -> None:
    """A vma that ends within 2 MiB is what makes the kernel split them."""
    if _libc.mprotect(ctypes.c_void_p(addr), ctypes.c_size_t(_PAGE), prot):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
