# SPDX-License-Identifier: MIT
"""The walk that snapshots and faults share: one native call a range, and what its refusals mean."""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from . import trace
from ._shim import ffi, lib
from .arguments import check_is, integer
from .callback import may_wait
from .errors import EHWPOISON, HasVmas, MirrorError, error
from .event import Guarantee
from .stale_sequence import note_refusal

if TYPE_CHECKING:
    from .mm import AddressSpace
    from .notifier import IntervalNotifier
    from .pfn import PfnArray

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
#: Where user addresses end (x86-64, 4-level page tables).
USER_END = 1 << 47

FAULT: int = lib.PM_WALK_FAULT | lib.PM_WALK_VERIFY
FAULT_NOBLOCK: int = FAULT | lib.PM_WALK_NOBLOCK
SNAPSHOT: int = lib.PM_WALK_STRICT | lib.PM_WALK_VERIFY

_WHY = {
    errno.EAGAIN: "cannot be faulted without waiting for I/O",
    errno.EBUSY: "was invalidated since its sequence number was taken",
    errno.EPERM: "the vma does not permit the access that is asked for",
    errno.ENOMEM: "no memory to fault the pages in",
}

_HINTS = {errno.EBUSY: "wait_until_valid() or read_begin() for a fresh sequence number, then go again"}


_RETRIES = {
    errno.ESTALE: "changed unseen",
    errno.EBUSY: "invalidated meanwhile",
    errno.EAGAIN: "would wait",
}


def check_interval(
    what: str, start: int, end: int, shift: int = PAGE_SHIFT, mm: HasVmas | None = None
) -> tuple[int, int]:
    """[start, end) as ints; EINVAL unless these are user addresses, aligned to pages of 1 << shift bytes."""
    start, end = integer(what, "start", start), integer(what, "end", end)
    page = 1 << shift
    if start % page or end % page:
        wrong = f"not aligned to pages of {page} bytes"
    elif start == end:
        wrong = "empty"
    elif start > end:
        wrong = "reversed"
    elif start < 0 or end > USER_END:
        wrong = f"beyond the address space (0-{USER_END:#x})"
    else:
        return start, end
    raise MirrorError(
        errno.EINVAL,
        f"{what}: [{start:#x}, {end:#x}) is {wrong}",
        addr=start,
        vma=mm._vma_for_error(start) if mm is not None else None,
        hint=f"give the first byte and the byte after the last, multiples of {page}",
    )


def check_covers(sub: IntervalNotifier, what: str, start: int, end: int) -> None:
    """EINVAL unless [start, end) lies in the notifier's interval."""
    if sub.start <= start and end <= sub.start + sub.length:
        return
    first = start if start < sub.start else max(start, sub.start + sub.length)
    raise error(
        errno.EINVAL,
        f"{what}: [{start:#x}, {end:#x}) is not inside {sub!r}, whose sequence would say nothing of it",
        addr=first,
        mm=sub.mm,
        hint="use a notifier that covers the range",
    )


def walk_error(mm: AddressSpace, walk: Any, ret: int, what: str) -> MirrorError:
    """The error of a failed pm_walk().

    -ESTALE is memory that changed with no event: its invalidation is made up for here, with the callbacks in
    this thread, and the caller gets EBUSY, since its sequence number moved.
    """
    if ret in (-errno.ESTALE, -errno.EBUSY, -errno.EAGAIN):
        trace.instant(trace.Track.RETRY, f"{what}: {_RETRIES[-ret]}", mm, walk.start, walk.end)
    if ret == -errno.ESTALE:
        start, end = walk.fail_start, walk.fail_end
        detected(mm, start, end)
        return error(
            errno.EBUSY,
            f"{what}: [{start:#x}, {end:#x}) had changed unseen and was invalidated now",
            addr=start,
            mm=mm,
            hint="take a new sequence number and go again",
        )
    if ret == -errno.EOPNOTSUPP:
        mm.features.require("pagemap", what)
        mm.features.require("populate", what)
    if ret == -errno.ESRCH:
        mm._check_pid(what)
    if ret == -errno.EFAULT:
        return _fault_error(mm, what, walk.fail_start)
    why = _WHY.get(-ret)
    if ret in (-errno.EAGAIN, -errno.EBUSY):
        why = f"[{walk.start:#x}, {walk.end:#x}) {why}"
    addr = walk.fail_start if ret in (-errno.EPERM, -EHWPOISON, -errno.ENOMEM) else walk.start
    return error(-ret, f"{what}: {why}" if why else what, addr=addr, mm=mm, hint=_HINTS.get(-ret))


def _fault_error(mm: AddressSpace, what: str, addr: int) -> MirrorError:
    """The EFAULT of a page, by the vma that is there now."""
    vma = mm._vma_for_error(addr)
    hint = None
    if vma is None:
        why = "a hole"
    elif vma.special:
        why, hint = "a device's or the kernel's own pages", "mirror memory that has pages of its own"
    elif not vma.prot & mmap.PROT_READ:
        why, hint = "no permission to read", "mprotect() it to permit that"
    elif vma.hugetlb:
        why, hint = "no huge page is left", "raise /proc/sys/vm/nr_overcommit_hugepages"
    elif vma.file:
        why, hint = "beyond the end of the file", "ftruncate() the file to the size of its mapping"
    else:
        why, hint = "the page cannot be had", "it may have changed just now: take a new sequence and go again"
    return error(errno.EFAULT, f"{what}: {why}", addr=addr, mm=mm, hint=hint)


def detected(mm: AddressSpace, start: int, end: int) -> None:
    """Deliver a change that was found by comparing page tables."""
    with mm.invalidate(start, end, guarantee=Guarantee.DETECTED):
        pass


def hmm_range_fault(
    sub: IntervalNotifier,
    start: int,
    end: int,
    pfns: PfnArray,
    *,
    default_flags: int = 0,
    pfn_flags_mask: int = 0,
    seq: int,
    dev_private_owner: object = None,
) -> None:
    """hmm_range_fault() as it is since 5.5: look at [start, end) and fault what is asked for.

    ``pfns`` is a contiguous uint64 array with one entry a 4 KiB page: in, requests; out, HMM pfns. The
    request of a page is ``(pfns[i] & pfn_flags_mask) | default_flags``. ``seq`` comes from
    ``sub.read_begin()``, and the interval lies in the notifier's. Without a request a hole gives
    HMM_PFN_ERROR and an absent page 0. The bits HMM_PFN_INOUT_FLAGS are left as they are.

    EBUSY: the sequence moved, begin again with read_begin(), the pfns are unusable. A thread that comes with
    the same sequence once more spins for ever, and gets a RuntimeWarning. EFAULT: a page asked for
    is in a hole or in a vma without access. EPERM: a write to a read-only vma. EINVAL, ENOMEM. ESRCH after
    close(). EDEADLK in a callback or under a driver lock. Pages in the DeviceMemory of
    ``dev_private_owner`` are valid as they are, with a PFN of their own (is_device_private_pfn()), whatever
    is asked for; those in other device memory come home when they are faulted.
    """
    what = "hmm_range_fault"
    may_wait(what)
    check_is(what, "sub", sub, "update_lock", "an IntervalNotifier")
    start, end = check_interval(what, start, end, mm=sub.mm)
    check_covers(sub, what, start, end)
    check_pfns(what, pfns, (end - start) >> PAGE_SHIFT)
    mm = sub.mm
    if not sub.watched:
        mm.watch(start, end)
    walk = ffi.new(
        "struct pm_walk *",
        {
            "start": start,
            "end": end,
            "pfns": ffi.from_buffer("uint64_t[]", pfns, require_writable=True),
            "default_flags": default_flags,
            "pfn_flags_mask": pfn_flags_mask,
            "owner": id(dev_private_owner) if dev_private_owner is not None else 0,
            "flags": FAULT,
            "sub": sub.native,
            "seq": seq,
        },
    )
    if trace.active is None:
        ret = lib.pm_walk_inout(mm.native, walk)
    else:
        with trace.span(trace.Track.WALK, what, mm, start, end, seq=seq) as span:
            ret = lib.pm_walk_inout(mm.native, walk)
            span.note(ret=ret)
    if ret < 0:
        raise _noted(sub, seq, walk_error(mm, walk, ret, what))


def _noted(sub: IntervalNotifier, seq: int, refused: MirrorError) -> MirrorError:
    """Its frame is not in the traceback: there the variable would keep the error, and all frames, alive."""
    if refused.errno == errno.EBUSY:
        note_refusal(sub, seq)
    return refused


def check_pfns(what: str, pfns: PfnArray, npages: int) -> None:
    """EINVAL unless it is what native code may write to."""
    if (
        isinstance(pfns, np.ndarray)
        and pfns.dtype == np.uint64
        and pfns.flags.c_contiguous
        and pfns.flags.writeable
        and pfns.size == npages
    ):
        return
    given = f"{pfns.dtype}[{pfns.size}]" if isinstance(pfns, np.ndarray) else type(pfns).__name__
    raise MirrorError(
        errno.EINVAL,
        f"{what}: a writable contiguous array of {npages} uint64 is wanted, not {given}",
        hint=f"np.zeros({npages}, np.uint64), one entry a 4 KiB page",
    )
