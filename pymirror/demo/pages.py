"""Pages by state, counted from a snapshot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import pymirror as pm

HUGE_ORDER = 9


@dataclass(slots=True)
class PageStates:
    """4 KiB pages. `valid`: present; of these `writable`, `huge` (2 MiB) and `zero` (the zero page).

    `zero` is None where PFNs cannot be read. `absent`: not present.
    """

    total: int = 0
    valid: int = 0
    writable: int = 0
    huge: int = 0
    zero: int | None = 0
    absent: int = 0

    def count(self, pfns: npt.NDArray[np.uint64], zero_pfn: int | None) -> None:
        """Add the pages of a snapshot; zero_pfn: of the zero page, None if unknown."""
        valid = (pfns & np.uint64(pm.HMM_PFN_VALID)) != 0
        self.total += pfns.size
        self.valid += int(np.count_nonzero(valid))
        self.absent += int(np.count_nonzero(~valid))
        self.writable += int(np.count_nonzero(valid & ((pfns & np.uint64(pm.HMM_PFN_WRITE)) != 0)))
        self.huge += int(np.count_nonzero(valid & (pm.hmm_pfn_to_map_order(pfns) >= HUGE_ORDER)))
        if zero_pfn is None or self.zero is None:
            self.zero = None
        else:
            self.zero += int(np.count_nonzero(valid & (pm.hmm_pfn_to_pfn(pfns) == zero_pfn)))
