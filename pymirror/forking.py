# SPDX-License-Identifier: MIT
"""Before os.fork(): private mappings of files are watched once they have pages of their own.

After a fork only a watched page shows whether it was written since. Mappings of files are not watched
otherwise, as that switches their fault-around off; so neither are those here that no notifier covers, or
that hold pages of the file only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from ._shim import ffi, lib
from .affected import USER_END
from .errors import MirrorError
from .notifier import KIND_INTERVAL, KIND_RANGE

if TYPE_CHECKING:
    from .mm import AddressSpace

_PRESENT = np.uint64(1 << 63)
_FILE = np.uint64(1 << 61)


def before_fork(open_mms: Callable[[], Iterable[AddressSpace]]) -> None:
    """Have this done before every os.fork() for the address spaces that are open then."""

    def watch_all() -> None:
        for mm in open_mms():
            # One that is closed meanwhile, or memory that goes: the fork goes on.
            with suppress(MirrorError):
                _watch_private_files(mm)

    os.register_at_fork(before=watch_all)


def _watch_private_files(mm: AddressSpace) -> None:
    for start, end in mm._regions.around(0, USER_END):
        if _covered(mm, start, end) and _has_own_file_pages(mm, start, end):
            mm.watch(start, end, files=True)


def _covered(mm: AddressSpace, start: int, end: int) -> bool:
    kinds = KIND_INTERVAL | KIND_RANGE
    return mm.notifiers.whole_mm or lib.pm_overlapping(mm.native, start, end, kinds, ffi.NULL, 0) > 0


def _has_own_file_pages(mm: AddressSpace, start: int, end: int) -> bool:
    private_files = (vma for vma in mm.vmas(start, end) if vma.file and not vma.shared)
    return any(_has_own_pages(mm, max(vma.start, start), min(vma.end, end)) for vma in private_files)


def _has_own_pages(mm: AddressSpace, start: int, end: int) -> bool:
    raw = np.empty((end - start) >> 12, np.uint64)
    if lib.pm_pagemap_read(mm.native, start, raw.size, ffi.from_buffer("uint64_t[]", raw)) < 0:
        return False
    return bool(np.any((raw & (_PRESENT | _FILE)) == _PRESENT))
