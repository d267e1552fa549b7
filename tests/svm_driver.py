"""What tests of the svm driver share."""

from __future__ import annotations

import pymirror as pm
from pymirror.drivers.svm import Svm

KiB64, HUGE = 64 << 10, 2 << 20


DEVICE_MEMORY = ("uffd_kernel", "uffd_events", "move", "pagemap")


def check_all_gone(svm: Svm) -> None:
    assert svm.ranges == svm.notifiers == []
    assert svm.device.page_table.stats()["entries"] == 0
    assert svm.mm.stats()["interval_notifiers"] == 0
    assert not svm.mm.errors
    assert svm.device.stats.stale == 0


def aligned(mm: pm.AddressSpace, size: int = 2 * HUGE) -> tuple[pm.Region, int]:
    """A Region, and an address in it from which on ``size`` bytes are aligned to 2 MiB."""
    buf = mm.mmap(size + HUGE)
    return buf, -(-buf.addr // HUGE) * HUGE


def spans(svm: Svm) -> list[tuple[int, int]]:
    return [(rng.start, rng.end) for rng in svm.ranges]
