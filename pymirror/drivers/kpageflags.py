# SPDX-License-Identifier: MIT
"""What /proc/kpageflags tells of pages by their PFN."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

_COMPOUND = np.uint64((1 << 15) | (1 << 16))
_HUGETLB = np.uint64(1 << 17)


def in_large_folio(pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether each page is part of a folio of several pages, hugetlb's excepted.

    ``pfns`` are page frame numbers; 0, and all of them without CAP_SYS_ADMIN, are in none.
    """
    large: npt.NDArray[np.bool_] = np.zeros(pfns.size, np.bool_)
    try:
        with open("/proc/kpageflags", "rb", buffering=0) as file:
            for first, last in _runs(pfns):
                file.seek(int(pfns[first]) * 8)
                flags = np.frombuffer(file.read((last - first) * 8), np.uint64)
                large[first : first + flags.size] = ((flags & _COMPOUND) != 0) & ((flags & _HUGETLB) == 0)
    except PermissionError:
        return large
    large &= pfns != 0
    return large


def _runs(pfns: npt.NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Index intervals of consecutive PFNs."""
    if not pfns.size:
        return []
    cuts = [0, *(np.flatnonzero(np.diff(pfns) != 1) + 1).tolist(), pfns.size]
    return list(pairwise(cuts))
