# SPDX-License-Identifier: MIT
"""Functions of the 5.1 series that are no method here: under their own names, over a Range.

Where the kernel has a struct page the process has a page frame number, so ``_to_page`` and ``_to_pfn`` of the
series are one function here. docs/hmm-5.1.md has the whole list.
"""

from __future__ import annotations

import errno
from typing import overload

import numpy as np
import numpy.typing as npt

from .arguments import check_is
from .callback import may_wait
from .errors import MirrorError
from .hmm_range import HMM_RANGE_DEFAULT_TIMEOUT, Range
from .pfn import HMM_PFN_VALID, PfnArray, hmm_pfn_to_pfn

_ALL = (1 << 64) - 1


def hmm_range_snapshot(rng: Range) -> int:
    """hmm_range_snapshot(): Range.snapshot(). Errors as Range.snapshot()."""
    check_is("hmm_range_snapshot", "rng", rng, "wait_until_valid", "a Range")
    return rng.snapshot()


def hmm_vma_fault(rng: Range, block: bool = True) -> int:
    """hmm_vma_fault(): register the range, wait until it is valid, and fault what each page's entry asks for.

    ``default_flags`` becomes 0 and ``pfn_flags_mask`` all ones, as in the kernel. Returns the sequence number
    and leaves the range registered; end with hmm_vma_range_done(). EBUSY: invalidated meanwhile, or not valid
    within HMM_RANGE_DEFAULT_TIMEOUT; EAGAIN: it would wait and ``block`` is false; EDEADLK in a callback and
    under a driver lock; else as Range.fault().
    After an error the range is registered only if it was before.
    """
    may_wait("hmm_vma_fault")
    check_is("hmm_vma_fault", "rng", rng, "wait_until_valid", "a Range")
    was_registered = rng.registered
    rng.register()
    rng.default_flags, rng.pfn_flags_mask = 0, _ALL
    try:
        if not rng.wait_until_valid(HMM_RANGE_DEFAULT_TIMEOUT):
            raise MirrorError(
                errno.EFAULT, "hmm_vma_fault: the address space is closed", hint="open a new AddressSpace"
            )
        return rng.fault(block)
    except BaseException as failed:
        if not was_registered:
            rng.unregister()
        if isinstance(failed, MirrorError) and failed.errno == errno.ETIMEDOUT:
            raise MirrorError(
                errno.EBUSY,
                f"hmm_vma_fault: [{rng.start:#x}, {rng.end:#x}) is still being invalidated after"
                f" {HMM_RANGE_DEFAULT_TIMEOUT} s",
                addr=rng.start,
                vma=failed.vma,
                hint="go again; AddressSpace.dump() shows what invalidates it",
            ) from failed
        raise


def hmm_vma_range_done(rng: Range) -> bool:
    """hmm_vma_range_done(): whether the range is valid still, under the driver's lock; and unregister it.

    EDEADLK in a callback.
    """
    check_is("hmm_vma_range_done", "rng", rng, "wait_until_valid", "a Range")
    stands = rng.valid
    rng.unregister()
    return stands


@overload
def hmm_device_entry_to_pfn(rng: Range, entry: int) -> int: ...
@overload
def hmm_device_entry_to_pfn(rng: Range, entry: PfnArray) -> npt.NDArray[np.int64]: ...
def hmm_device_entry_to_pfn(rng: Range, entry: int | PfnArray) -> int | npt.NDArray[np.int64]:
    """hmm_device_entry_to_pfn() and _to_page(): the PFN in an entry of ``rng.pfns``, or in an array of them.

    -1 where the entry holds none: nothing there, an error, a special page. 0 without CAP_SYS_ADMIN.
    """
    check_is("hmm_device_entry_to_pfn", "rng", rng, "encoding", "a Range")
    entries = np.atleast_1d(np.asarray(entry, np.uint64))
    if rng.encoding is not None:
        found = rng.encoding.to_pfns(entries)
    else:
        found = hmm_pfn_to_pfn(entries).astype(np.int64)
        found[(entries & np.uint64(HMM_PFN_VALID)) == 0] = -1
    return found if isinstance(entry, np.ndarray) else int(found[0])


@overload
def hmm_device_entry_from_pfn(rng: Range, pfn: int) -> int: ...
@overload
def hmm_device_entry_from_pfn(rng: Range, pfn: PfnArray) -> PfnArray: ...
def hmm_device_entry_from_pfn(rng: Range, pfn: int | PfnArray) -> int | PfnArray:
    """hmm_device_entry_from_pfn() and _from_page(): a valid entry in the bits of ``rng``, or an array."""
    check_is("hmm_device_entry_from_pfn", "rng", rng, "encoding", "a Range")
    pfns = np.atleast_1d(np.asarray(pfn, np.uint64))
    own = rng.encoding
    entries = pfns | np.uint64(HMM_PFN_VALID) if own is None else own.from_pfns(pfns)
    return entries if isinstance(pfn, np.ndarray) else int(entries[0])
