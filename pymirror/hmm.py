# SPDX-License-Identifier: MIT
"""HMM: mirroring an address space, with the API of the 5.1 series and the modern hmm_range_fault().

The order that a driver keeps, as the kernel's Documentation/mm/hmm.rst has it:

    with mirror.range(start, end) as rng:
        rng.default_flags = HMM_PFN_REQ_FAULT
        while True:
            rng.wait_until_valid(timeout=1.0)
            try:
                seq = rng.fault()
            except OSError as error:
                if error.errno in (errno.EBUSY, errno.EAGAIN): continue
                raise
            with mirror.lock:
                if rng.valid and device.page_table.map(rng, seq): break
"""

from .hmm_mirror import Hmm, Mirror
from .hmm_range import HMM_RANGE_DEFAULT_TIMEOUT, Range
from .hmm_series import (
    hmm_device_entry_from_pfn,
    hmm_device_entry_to_pfn,
    hmm_range_snapshot,
    hmm_vma_fault,
    hmm_vma_range_done,
)
from .walk import hmm_range_fault

__all__ = [
    "HMM_RANGE_DEFAULT_TIMEOUT",
    "Hmm",
    "Mirror",
    "Range",
    "hmm_device_entry_from_pfn",
    "hmm_device_entry_to_pfn",
    "hmm_range_fault",
    "hmm_range_snapshot",
    "hmm_vma_fault",
    "hmm_vma_range_done",
]
