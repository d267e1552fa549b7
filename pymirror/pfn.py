# SPDX-License-Identifier: MIT
"""The HMM pfn: one uint64 a page, with the bits of the kernel's ``enum hmm_pfn_flags``."""

from __future__ import annotations

from typing import overload

import numpy as np
import numpy.typing as npt

PfnArray = npt.NDArray[np.uint64]

#: The page is there; with HMM_PFN_REQ_FAULT the same bit asks for it.
HMM_PFN_VALID = 1 << 63
#: The page may be written; with HMM_PFN_REQ_WRITE the same bit asks for that.
HMM_PFN_WRITE = 1 << 62
#: No page can ever be there: a hole, an unreadable vma, device memory of another driver.
HMM_PFN_ERROR = 1 << 61

#: Kept across faults (HMM_PFN_INOUT_FLAGS): the page is mapped for DMA; it is peer-to-peer memory; the bus
#: address is the peer's.
HMM_PFN_DMA_MAPPED = 1 << 60
HMM_PFN_P2PDMA = 1 << 59
HMM_PFN_P2PDMA_BUS = 1 << 58
HMM_PFN_INOUT_FLAGS = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS

HMM_PFN_ORDER_SHIFT = 53

#: Fault the page in if it is absent.
HMM_PFN_REQ_FAULT = HMM_PFN_VALID
#: Fault the page in for writing; only together with HMM_PFN_REQ_FAULT.
HMM_PFN_REQ_WRITE = HMM_PFN_WRITE

#: The bits that are not the PFN.
HMM_PFN_FLAGS = 0x7FF << HMM_PFN_ORDER_SHIFT

_ORDER_MASK = 0x1F

#: PFNs of device-private memory have this bit, which no RAM has: they are beyond what memory there can be, as
#: the kernel's are.
_DEVICE = 1 << 51
#: ... and this one, where a device has exclusive access.
_EXCLUSIVE = 1 << 50


@overload
def hmm_pfn_to_map_order(pfn: int) -> int: ...
@overload
def hmm_pfn_to_map_order(pfn: PfnArray) -> PfnArray: ...
def hmm_pfn_to_map_order(pfn: int | PfnArray) -> int | PfnArray:
    """Order of the CPU mapping that the page is part of: 0 for 4 KiB, 9 for 2 MiB. A pfn or an array of them.

    The mapping may reach beyond the range that was asked for, as in the kernel.
    """
    if isinstance(pfn, np.ndarray):
        return (pfn >> np.uint64(HMM_PFN_ORDER_SHIFT)) & np.uint64(_ORDER_MASK)
    return (int(pfn) >> HMM_PFN_ORDER_SHIFT) & _ORDER_MASK


@overload
def hmm_pfn_to_pfn(pfn: int) -> int: ...
@overload
def hmm_pfn_to_pfn(pfn: PfnArray) -> PfnArray: ...
def hmm_pfn_to_pfn(pfn: int | PfnArray) -> int | PfnArray:
    """The page frame number, flags taken off: the kernel's hmm_pfn_to_page(). A pfn or an array of them.

    0 where the process may not see PFNs (no CAP_SYS_ADMIN).
    """
    if isinstance(pfn, np.ndarray):
        return pfn & np.uint64(HMM_PFN_FLAGS ^ 0xFFFF_FFFF_FFFF_FFFF)
    return int(pfn) & ~HMM_PFN_FLAGS


@overload
def is_device_private_pfn(pfn: int) -> bool: ...
@overload
def is_device_private_pfn(pfn: PfnArray) -> npt.NDArray[np.bool_]: ...
def is_device_private_pfn(pfn: int | PfnArray) -> bool | npt.NDArray[np.bool_]:
    """Whether an HMM pfn, or each of an array, is of device-private memory (is_device_private_page())."""
    return _has(pfn, _DEVICE | _EXCLUSIVE, _DEVICE)


@overload
def is_device_exclusive_pfn(pfn: int) -> bool: ...
@overload
def is_device_exclusive_pfn(pfn: PfnArray) -> npt.NDArray[np.bool_]: ...
def is_device_exclusive_pfn(pfn: int | PfnArray) -> bool | npt.NDArray[np.bool_]:
    """Whether an HMM pfn, or each of an array, came from make_device_exclusive()."""
    return _has(pfn, _DEVICE | _EXCLUSIVE, _DEVICE | _EXCLUSIVE)


def _has(pfn: int | PfnArray, mask: int, bits: int) -> bool | npt.NDArray[np.bool_]:
    if not isinstance(pfn, np.ndarray):
        return int(pfn) & mask == bits
    has: npt.NDArray[np.bool_] = (pfn & np.uint64(mask)) == np.uint64(bits)
    return has
