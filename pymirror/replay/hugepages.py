"""2 MiB hugetlb pages for a while: the kernel hands out surplus pages up to nr_overcommit_hugepages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OVERCOMMIT = Path("/proc/sys/vm/nr_overcommit_hugepages")
_ENOUGH = 8


@contextmanager
def overcommit(pages: int = _ENOUGH) -> Iterator[str | None]:
    """Allow `pages` surplus huge pages inside the block, and put the limit back.

    Gives None, or why there are none: an ordinary user may not set the limit, and has huge pages only where
    the administrator reserved them; what the limit allows at the moment is another's.
    """
    before = int(_OVERCOMMIT.read_text())
    pool = _pool()
    # Reserved pages are spoken for, and surplus ones count against the limit, whoever has them.
    unreserved = max(0, pool["Free"] - pool["Rsvd"])
    allowed = max(0, before - pool["Surp"]) if os.geteuid() == 0 else 0
    if unreserved + allowed >= pages:
        yield None
        return
    try:
        _OVERCOMMIT.write_text(str(pool["Surp"] + pages))
    except PermissionError:
        yield f"no {pages} huge pages, and setting {_OVERCOMMIT} needs root"
        return
    try:
        yield None
    finally:
        _OVERCOMMIT.write_text(str(before))


def _pool() -> dict[str, int]:
    """Free, Rsvd, Surp and Total of the pool of 2 MiB pages."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {
        name.removeprefix("HugePages_"): int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in lines)
        if name.startswith("HugePages_")
    }
