"""What the kernel's test device does that a driver need not do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quirks:
    """What the test device of Linux 6.12 does that a driver need not do.

    ======================  ==============================================================================
    chunk_pages             Range faults and snapshots go in calls of this many pages, counted from where the
                            fault struck, not from an aligned address.
    overrun_pages           An invalidation drops this many pages beyond its last one: the device takes the
                            exclusive end for the last page of the interval.
    fault_to_end            A device fault populates everything from the missing page to the end of the
                            command's request, asking for the same access everywhere, not the missing run.
    faults_rest_of_pmd      Where a range fault finds a page wanting, it touches all that follows in the call
                            and in the 2 MiB (hmm_vma_fault()): the device's own pages there come home.
    own_migrations          An invalidation by a migration to or from the device's own memory drops the
                            entries of the pages that move and no others.
    clears_new_pages        Pages that were never touched get memory of the device, cleared, when they
                            migrate; they come home as pages of zeroes, not as holes.
    mapped_folios_stay      Pages of a large folio that no PMD maps as a whole do not migrate.
    large_folios_not_had    Pages of a large folio are not had exclusively; what maps it as a whole is split.
    setup_splits            A migration home, too, splits the huge pages that it looks at.
    fault_timeout           Seconds in which a range fault is tried again before it is EBUSY.
    ======================  ==============================================================================
    """

    chunk_pages: int = 64
    overrun_pages: int = 1
    fault_to_end: bool = True
    faults_rest_of_pmd: bool = True
    own_migrations: bool = True
    clears_new_pages: bool = True
    mapped_folios_stay: bool = True
    large_folios_not_had: bool = True
    setup_splits: bool = True
    fault_timeout: float = 1.0


LINUX_6_12 = Quirks()
