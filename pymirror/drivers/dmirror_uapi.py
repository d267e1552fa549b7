"""What commands of the kernel's test device give: lib/test_hmm_uapi.h."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..device_memory import DeviceMemory, coherent_pages
from ..mm import AddressSpace
from ..pfn import (
    HMM_PFN_ERROR,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    PfnArray,
    hmm_pfn_to_map_order,
    hmm_pfn_to_pfn,
    is_device_private_pfn,
)

PAGE = 4096
#: Of a huge page, as hmm_pfn_to_map_order() gives it.
PMD_ORDER = 9

PROT_ERROR = 0xFF
PROT_NONE = 0x00
PROT_READ = 0x01
PROT_WRITE = 0x02
PROT_PMD = 0x04
PROT_ZERO = 0x10
PROT_DEV_PRIVATE_LOCAL = 0x20
PROT_DEV_COHERENT_LOCAL = 0x40
PROT_DEV_COHERENT_REMOTE = 0x50

# A flag of FLAGS.
FAIL_ALLOC = 1

_REMOTE = PROT_DEV_COHERENT_REMOTE & ~PROT_DEV_COHERENT_LOCAL


@dataclass(frozen=True, slots=True)
class Result:
    """What a command gives: pages served, fault rounds, and bytes (a READ's pages, a SNAPSHOT's bytes)."""

    cpages: int
    faults: int = 0
    data: bytes = b""


def mkentries(mm: AddressSpace, memory: DeviceMemory, start: int, pfns: PfnArray) -> bytes:
    """What a SNAPSHOT says of pages from ``start`` on, a byte each, with these HMM pfns."""
    valid = (pfns & HMM_PFN_VALID) != 0
    writable = (pfns & HMM_PFN_WRITE) != 0
    found = np.where(writable, PROT_WRITE, PROT_READ)
    # 0: not known, as PFNs are not shown to everybody.
    if zero := mm.features.zero_pfn:
        found |= np.where(hmm_pfn_to_pfn(pfns) == zero, PROT_ZERO, 0)
    found |= np.where(hmm_pfn_to_map_order(pfns) == PMD_ORDER, PROT_PMD, 0)
    found |= np.where(is_device_private_pfn(pfns), PROT_DEV_PRIVATE_LOCAL, 0)
    if memory.kind == "coherent":
        end = start + pfns.size * PAGE
        coherent = coherent_pages(mm, start, end)
        found |= np.where(coherent, PROT_DEV_COHERENT_LOCAL, 0)
        found |= np.where(coherent & ~memory.holds(start, end), _REMOTE, 0)
    found = np.where(valid, found, PROT_NONE)
    found = np.where((pfns & HMM_PFN_ERROR) != 0, PROT_ERROR, found)
    return found.astype(np.uint8).tobytes()
