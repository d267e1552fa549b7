# SPDX-License-Identifier: MIT
"""Memory that another userfaultfd of this process has: another library's, or another AddressSpace's.

The kernel gives a vma to one userfaultfd at a time. Such memory is not watched and does not migrate; it can
be faulted, mapped and pinned as any other, and changes of it are found by comparing page tables.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .mm import AddressSpace
    from .vma import Vma

_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")
#: Of VmFlags in /proc/PID/smaps: registered for missing, minor and write-protection faults.
_REGISTERED = {"um", "ui", "uw"}


def vma_of_other_userfaultfd(mm: AddressSpace, start: int, end: int) -> Vma | None:
    """The first vma of [start, end) that a userfaultfd has which is not that of ``mm``, or None.

    It reads /proc/self/smaps, some µs a vma of the process: for a refusal only.
    """
    for first, last in _registered(start, end):
        if mm.watch(max(first, start), min(last, end), files=True) == 0:
            return mm._vma_for_error(max(first, start))
    return None


def _registered(start: int, end: int) -> list[tuple[int, int]]:
    found, at = [], (0, 0)
    try:
        with open("/proc/self/smaps") as smaps:
            for line in smaps:
                if head := _HEAD.match(line):
                    at = (int(head[1], 16), int(head[2], 16))
                elif (
                    line.startswith("VmFlags:")
                    and at[0] < end
                    and start < at[1]
                    and _REGISTERED & set(line.split())
                ):
                    found.append(at)
    except OSError:
        return []  # without /proc there is no more to say than that it cannot be had
    return found
