# SPDX-License-Identifier: MIT
"""The entries of migrate_vma's ``src`` and ``dst``: MIGRATE_PFN_* bits, and a PFN."""

from __future__ import annotations

from typing import overload

import numpy as np

from .pfn import PfnArray

#: There is a page. In ``src`` and ``dst``.
MIGRATE_PFN_VALID = 1 << 0
#: It can migrate; after migrate_vma_pages(): it has.
MIGRATE_PFN_MIGRATE = 1 << 1
#: The CPU may write it.
MIGRATE_PFN_WRITE = 1 << 3
#: Where the PFN begins.
MIGRATE_PFN_SHIFT = 6

_U64 = np.uint64


@overload
def migrate_pfn(pfn: int) -> int: ...
@overload
def migrate_pfn(pfn: PfnArray) -> PfnArray: ...
def migrate_pfn(pfn: int | PfnArray) -> int | PfnArray:
    """The entry of ``dst`` for a PFN, or for each of an array."""
    if isinstance(pfn, np.ndarray):
        return (pfn << _U64(MIGRATE_PFN_SHIFT)) | _U64(MIGRATE_PFN_VALID)
    return int(pfn) << MIGRATE_PFN_SHIFT | MIGRATE_PFN_VALID


@overload
def migrate_pfn_to_pfn(entry: int) -> int: ...
@overload
def migrate_pfn_to_pfn(entry: PfnArray) -> PfnArray: ...
def migrate_pfn_to_pfn(entry: int | PfnArray) -> int | PfnArray:
    """The PFN of an entry, or of each of an array; 0 without MIGRATE_PFN_VALID."""
    if isinstance(entry, np.ndarray):
        valid = (entry & _U64(MIGRATE_PFN_VALID)) != 0
        return np.where(valid, entry >> _U64(MIGRATE_PFN_SHIFT), _U64(0))
    return int(entry) >> MIGRATE_PFN_SHIFT if int(entry) & MIGRATE_PFN_VALID else 0
