# SPDX-License-Identifier: MIT
"""Pages of another process by state: PAGEMAP_SCAN of its pagemap, or its plain entries on older kernels.

The kernel takes the mmap lock of the process for it, for reading, and that may be held: so it is done in a
thread that is left behind when its time is over.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from ..errors import errno_name

LIMIT_S = 2.0
_PAGE_SHIFT = 12
_WINDOW = 1 << 30
_REGIONS = 4096
# As in linux/fs.h: _IOWR('f', 16, struct pm_scan_arg), and its categories.
_PAGEMAP_SCAN = 0xC0606610
_FILE, _PRESENT, _SWAPPED, _ZERO, _HUGE = 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6
_ENTRY_FILE, _ENTRY_SWAPPED, _ENTRY_PRESENT = 1 << 61, 1 << 62, 1 << 63


class _ScanArg(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    ]


@dataclass(slots=True)
class Pages:
    """4 KiB pages of ``total``. ``looked_at`` of them were looked at; the others are counts among these.

    ``file``: present and of a file or of shared memory; ``zero``: the zero page; ``swapped``: in swap, or
    with a marker of userfaultfd in its place. None where this kernel does not tell. ``why`` is set when not
    all could be looked at.
    """

    total: int = 0
    looked_at: int = 0
    present: int = 0
    huge: int | None = 0
    zero: int | None = 0
    swapped: int = 0
    file: int = 0
    why: str = ""

    @property
    def absent(self) -> int:
        return self.looked_at - self.present - self.swapped

    def to_json(self) -> dict[str, object]:
        found: dict[str, object] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**found, "absent": self.absent}


def count(pid: int, ranges: Iterable[tuple[int, int]], limit_s: float = LIMIT_S) -> Pages:
    """The pages of these ranges of bytes by state; what was seen within ``limit_s`` seconds. Never raises."""
    todo = list(ranges)
    pages = Pages(total=sum(end - start for start, end in todo) >> _PAGE_SHIFT)
    if not todo:
        return pages
    counter = _Counter(pid, pages, time.monotonic() + limit_s)
    looker = threading.Thread(target=counter.run, args=(todo,), daemon=True)
    looker.start()
    looker.join(limit_s + 0.5)
    if looker.is_alive():
        counter.abandoned = True
        return Pages(
            total=pages.total,
            why=f"no answer within {limit_s:g} s: a thread of the process holds its mmap lock in the kernel",
        )
    return pages


class _Counter:
    def __init__(self, pid: int, pages: Pages, deadline: float) -> None:
        self.path = f"/proc/{pid}/pagemap"
        self.pages = pages
        self.deadline = deadline
        self.abandoned = False
        self._vec = np.zeros((_REGIONS, 3), np.uint64)

    def run(self, todo: list[tuple[int, int]]) -> None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as refused:
            self.pages.why = f"{self.path}: {_text(refused)}"
            return
        try:
            self._count(fd, todo)
        except OSError as refused:
            self.pages.why = f"{self.path}: {_text(refused)}"
        finally:
            os.close(fd)

    def _count(self, fd: int, todo: list[tuple[int, int]]) -> None:
        look = self._scan
        for first, last in todo:
            at = first
            while at < last:
                if self.abandoned or time.monotonic() > self.deadline:
                    self.pages.why = "there are too many to look at all of them in time"
                    return
                end = min(last, at + _WINDOW)
                try:
                    at = look(fd, at, end)
                except OSError as refused:
                    if look == self._read or refused.errno not in (errno.ENOTTY, errno.EINVAL):
                        raise
                    look = self._read
                    self.pages.huge = self.pages.zero = None

    def _scan(self, fd: int, start: int, end: int) -> int:
        scan = _ScanArg(
            size=ctypes.sizeof(_ScanArg),
            start=start,
            end=end,
            vec=self._vec.ctypes.data,
            vec_len=_REGIONS,
            category_anyof_mask=_PRESENT | _SWAPPED,
            return_mask=_FILE | _PRESENT | _SWAPPED | _ZERO | _HUGE,
        )
        found = fcntl.ioctl(fd, _PAGEMAP_SCAN, scan)
        regions = self._vec[:found]
        sizes = (regions[:, 1] - regions[:, 0]) >> np.uint64(_PAGE_SHIFT)

        def pages(category: int) -> int:
            return int(sizes[(regions[:, 2] & np.uint64(category)) == np.uint64(category)].sum())

        here = self.pages
        here.present += pages(_PRESENT)
        here.swapped += pages(_SWAPPED)
        here.file += pages(_PRESENT | _FILE)
        here.zero = (here.zero or 0) + pages(_PRESENT | _ZERO)
        here.huge = (here.huge or 0) + pages(_PRESENT | _HUGE)
        here.looked_at += (scan.walk_end - start) >> _PAGE_SHIFT
        return int(scan.walk_end)

    def _read(self, fd: int, start: int, end: int) -> int:
        end = min(end, start + (1 << 27))
        raw = os.pread(fd, (end - start) >> (_PAGE_SHIFT - 3), start >> (_PAGE_SHIFT - 3))
        entries = np.frombuffer(raw, np.uint64)
        if not entries.size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def pages(bits: int) -> int:
            return int(np.count_nonzero((entries & np.uint64(bits)) == np.uint64(bits)))

        self.pages.present += pages(_ENTRY_PRESENT)
        self.pages.swapped += pages(_ENTRY_SWAPPED)
        self.pages.file += pages(_ENTRY_PRESENT | _ENTRY_FILE)
        self.pages.looked_at += entries.size
        return start + (entries.size << _PAGE_SHIFT)


def _text(error: OSError) -> str:
    return f"{errno_name(error.errno or 0)} ({error.strerror})"
