# SPDX-License-Identifier: MIT
"""What an invalidation says of itself: event, guarantee and the range that callbacks get."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mm import AddressSpace

#: Exclusive end of an interval that is the whole address space. The native side writes it 0.
WHOLE_MM_END = 1 << 64


class Event(IntEnum):
    """Why memory is invalidated: the kernel's ``enum mmu_notifier_event``."""

    UNMAP = 0
    CLEAR = 1
    PROTECTION_VMA = 2
    PROTECTION_PAGE = 3
    SOFT_DIRTY = 4
    RELEASE = 5
    MIGRATE = 6
    EXCLUSIVE = 7


class Guarantee(StrEnum):
    """How an invalidation was learnt.

    ``before``: no stale entry is used once the change is made. ``after``: none is used once the call that
    made the change has returned to its caller. ``detected``: the change was found by comparing page tables.
    """

    BEFORE = "before"
    AFTER = "after"
    DETECTED = "detected"

    @property
    def native(self) -> int:
        """The number in ``enum pm_guarantee``."""
        return _NATIVE[self]

    @classmethod
    def from_native(cls, number: int) -> Guarantee:
        """The guarantee of a number of ``enum pm_guarantee``."""
        return _BY_NUMBER[number]


_BY_NUMBER = (Guarantee.BEFORE, Guarantee.AFTER, Guarantee.DETECTED)
_NATIVE = {guarantee: number for number, guarantee in enumerate(_BY_NUMBER)}


@dataclass(slots=True)
class MmuNotifierRange:
    """One invalidation of [start, end), bytes: the ``update`` of callbacks (``struct mmu_notifier_range``).

    ``end`` is exclusive, ``1 << 64`` for the whole address space. ``owner`` is what the invalidator called
    itself (a driver ignores its own MIGRATE and EXCLUSIVE). ``seq`` is the mm's sequence number, odd, that
    the invalidation set. ``overflow`` marks the range that stands for any number of lost events. Where it
    stands for more than one invalidation (CPU faults on neighbouring pages on a device, an overflow), ``seq``
    is the number of the last, and ``first_seq``, else 0, that of the first.
    """

    mm: AddressSpace
    start: int
    end: int
    event: Event
    owner: Any = None
    blockable: bool = True
    guarantee: Guarantee = Guarantee.BEFORE
    seq: int = 0
    overflow: bool = False
    first_seq: int = 0

    def __str__(self) -> str:
        note = " overflow" if self.overflow else ""
        return f"{self.event.name} {self.start:#x}-{self.end:#x} ({self.guarantee}, seq {self.seq}{note})"


def native_end(end: int) -> int:
    """An exclusive end as the native side has it: 0 for the end of the address space."""
    return 0 if end >= WHOLE_MM_END else end


def python_end(end: int) -> int:
    """An exclusive end from the native side."""
    return end or WHOLE_MM_END
