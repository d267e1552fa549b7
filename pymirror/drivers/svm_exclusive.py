# SPDX-License-Identifier: MIT
"""A page for the device alone, for its atomics (nouveau_atomic_range_fault())."""

from __future__ import annotations

import errno

from ..device import Device
from ..errors import MirrorError, error
from ..exclusive import exclusive_pfns, make_device_exclusive
from ..mm import AddressSpace
from ..notifier import IntervalNotifier
from ..pfn import PfnArray
from ..walk import PAGE_SIZE
from .retry import RangeRetry


def map_exclusive(retry: RangeRetry, device: Device, sub: IntervalNotifier, addr: int, owner: object) -> None:
    """Take the page at addr away from the CPU, until it touches it, and map it for the device.

    EOPNOTSUPP: it cannot be had. EBUSY at the deadline; errors as make_device_exclusive().
    """
    page = addr // PAGE_SIZE * PAGE_SIZE

    def look(seq: int) -> PfnArray:
        pfns = exclusive_pfns(sub.mm, page, page + PAGE_SIZE)
        if pfns.all():
            return pfns
        _take(sub.mm, page, owner)
        # Which was an invalidation, of this sequence too.
        raise error(errno.EBUSY, "svm: exclusive from here on", addr=page, mm=sub.mm)

    retry.run(sub, look, lambda seq, pfns: device.page_table.map(sub, seq, page, pfns), addr=page)


def _take(mm: AddressSpace, page: int, owner: object) -> None:
    try:
        make_device_exclusive(mm, page, owner)
    except MirrorError as refused:
        if refused.errno != errno.EBUSY:
            raise
        raise error(
            errno.EOPNOTSUPP,
            "svm: an atomic on memory that can neither move nor be had alone",
            addr=page,
            mm=mm,
            hint="private memory of this process's own, which is not pinned",
        ) from refused
