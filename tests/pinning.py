"""How much is pinned, by the kernel's own account."""

from __future__ import annotations

import pymirror as pm

FLAGS = pm.FOLL_WRITE | pm.FOLL_LONGTERM


def kept() -> int:
    """Bytes that this process has pinned through io_uring."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPin:"))


def pins_of_the_kernel() -> tuple[int, int]:
    """Pages pinned and unpinned since the machine booted, by anybody. Folding the counts first is root's."""
    with open("/proc/sys/vm/stat_refresh", "w") as refresh:
        refresh.write("1")
    with open("/proc/vmstat") as lines:
        found = dict(line.split() for line in lines)
    return int(found["nr_foll_pin_acquired"]), int(found["nr_foll_pin_released"])
