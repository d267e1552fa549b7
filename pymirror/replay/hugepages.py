"""2 MiB hugetlb pages for a while: the kernel hands out surplus pages up to nr_overcommit_hugepages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OVERCOMMIT = Path("/proc/sys/vm/nr_overcommit_hugepages")
_ENOUGH = 8


@contextmanager
def overcommit(pages: int = _ENOUGH) -> Iterator[str | None]:
    """Allow `pages` surplus huge pages inside the block, and put the limit back.

    Gives None, or why there are none: an ordinary user may not set the limit, and has huge pages only where
    the administrator reserved them.
    """
    before = int(_OVERCOMMIT.read_text())
    if before >= pages or _free() >= pages:
        yield None
        return
    try:
        _OVERCOMMIT.write_text(str(pages))
    except PermissionError:
        yield f"no {pages} huge pages, and setting {_OVERCOMMIT} needs root"
        return
    try:
        yield None
    finally:
        _OVERCOMMIT.write_text(str(before))


def _free() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Free:"):
            return int(line.split()[1])
    return 0
