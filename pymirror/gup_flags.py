# SPDX-License-Identifier: MIT
"""FOLL_* flags, with the kernel's numbers, and why user space can have only FOLL_WRITE | FOLL_LONGTERM."""

from __future__ import annotations

import errno

from .errors import MirrorError

#: The device writes to the pages: they are faulted for writing, copy-on-write is broken.
FOLL_WRITE = 1 << 0
#: The kernel's own: references instead of pins (get_user_pages()).
FOLL_GET = 1 << 1
#: The pages are held for as long as the driver likes: they are moved out of movable zones first.
FOLL_LONGTERM = 1 << 8
#: The kernel's own: pin_user_pages() adds it.
FOLL_PIN = 1 << 19

#: Flags that a driver may give to the kernel's pin_user_pages(), and why they are not to be had here.
_DRIVERS = {
    1 << 2: ("FOLL_DUMP", "it is for core dumps"),
    1 << 3: ("FOLL_FORCE", "an io_uring never writes against the protection of a vma"),
    1 << 4: ("FOLL_NOWAIT", "an io_uring waits for I/O"),
    1 << 5: ("FOLL_NOFAULT", "an io_uring faults pages in"),
    1 << 6: ("FOLL_HWPOISON", "an io_uring reports poisoned pages as EFAULT"),
    1 << 7: ("FOLL_ANON", "an io_uring takes pages of files too"),
    1 << 9: ("FOLL_SPLIT_PMD", "an io_uring leaves huge pages whole"),
    1 << 10: ("FOLL_PCI_P2PDMA", "an io_uring refuses pages of PCI devices"),
    1 << 11: ("FOLL_INTERRUPTIBLE", "only a fatal signal interrupts an io_uring's pinning"),
    1 << 12: ("FOLL_HONOR_NUMA_FAULT", "an io_uring does not ask for NUMA hinting faults"),
}
_INTERNAL = {
    FOLL_GET: "FOLL_GET",
    FOLL_PIN: "FOLL_PIN",
    1 << 16: "FOLL_TOUCH",
    1 << 17: "FOLL_TRIED",
    1 << 18: "FOLL_REMOTE",
    1 << 20: "FOLL_FAST_ONLY",
    1 << 21: "FOLL_UNLOCKABLE",
    1 << 22: "FOLL_MADV_POPULATE",
}


def check_flags(what: str, flags: int) -> None:
    """EINVAL for flags that no driver may give, EOPNOTSUPP for those that an io_uring does not have."""
    if flags == FOLL_WRITE | FOLL_LONGTERM:
        return
    for bit, name in _INTERNAL.items():
        if flags & bit:
            why = "pin_user_pages() adds it itself" if bit == FOLL_PIN else "it is internal to the kernel"
            raise _refused(what, errno.EINVAL, f"{name}: {why}")
    known = FOLL_WRITE | FOLL_LONGTERM | sum(_DRIVERS)
    if flags < 0 or flags & ~known:
        raise _refused(what, errno.EINVAL, f"flags {flags:#x}: no such flag")
    for bit, (name, why) in _DRIVERS.items():
        if flags & bit:
            raise _refused(what, errno.EOPNOTSUPP, f"{name}: {why}")
    if not flags & FOLL_WRITE:
        why = "without FOLL_WRITE: an io_uring pins for writing, and would break copy-on-write unasked"
        raise _refused(what, errno.EOPNOTSUPP, why)
    if not flags & FOLL_LONGTERM:
        why = "without FOLL_LONGTERM: an io_uring pins for long, which moves pages and refuses files on disk"
        raise _refused(what, errno.EOPNOTSUPP, why)


def _refused(what: str, number: int, wrong: str) -> MirrorError:
    return MirrorError(number, f"{what}: {wrong}", hint="give FOLL_WRITE | FOLL_LONGTERM")
