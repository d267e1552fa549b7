"""What the run had to do without, of the things that it would have used."""

from __future__ import annotations

import errno

from pymirror.demo.memory import HUGETLB_CHUNKS, Kind
from pymirror.features import Features, Missing

USED = (
    "uffd",
    "wp_async",
    "uffd_events",
    "event_fork",
    "pagemap",
    "pfn",
    "pagemap_scan",
    "procmap_query",
    "populate",
    "process_vm",
)


def missing_features(features: Features, refused: dict[Kind, OSError]) -> list[Missing]:
    """Features that are not there, and kinds of memory that could not be mapped."""
    missing = [entry for entry in features.all_missing() if entry.feature in USED]
    return missing + [_memory(kind, error) for kind, error in refused.items()]


def _memory(kind: Kind, error: OSError) -> Missing:
    number = error.errno or errno.ENOMEM
    return Missing(
        feature=kind.value,
        errno=number,
        reason="the machine's pool of 2 MiB pages is empty" if number == errno.ENOMEM else str(error),
        lost="no hugetlb memory was mirrored",
        command=f"sudo sysctl -w vm.nr_hugepages={4 * HUGETLB_CHUNKS}",
    )
