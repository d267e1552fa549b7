# SPDX-License-Identifier: MIT
"""How pages get pinned: who must be told, which pages they are, and why it failed."""

from __future__ import annotations

import errno
import mmap
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ._shim import ffi, lib
from .errors import MirrorError, check, error
from .event import Event
from .features import memlock_command
from .notifier import KIND_RANGE, wait_read_begin
from .pfn import HMM_PFN_ORDER_SHIFT, HMM_PFN_VALID, HMM_PFN_WRITE
from .vma import Vma
from .walk import PAGE_SHIFT, PAGE_SIZE, detected

if TYPE_CHECKING:
    from .mm import AddressSpace
    from .pfn import PfnArray

_ATTEMPTS = 16
_WAIT_S = 1.0
_CAP_IPC_LOCK = 14

_VALID = np.uint64(HMM_PFN_VALID)
_WRITABLE = np.uint64(HMM_PFN_VALID | HMM_PFN_WRITE)
_PFN = np.uint64((1 << HMM_PFN_ORDER_SHIFT) - 1)


def pin_pages(mm: AddressSpace, what: str, start: int, npages: int) -> tuple[Any, PfnArray]:
    """The ``pm_pin *`` and the pfns of the pages that it holds."""
    pinning = _Pinning(mm, what, start, npages)
    with mm._operation(what, write=False):
        mm.features.require("io_uring", what)
        mm.watch(start, pinning.end)
        with pinning.notified():
            for _ in range(_ATTEMPTS):
                native = pinning.attempt()
                if native is not None:
                    return native, pinning.after | _WRITABLE
    raise MirrorError(
        errno.EBUSY,
        f"{what}: [{start:#x}, {pinning.end:#x}) was exchanged meanwhile, {_ATTEMPTS} times",
        addr=start,
        hint="pin it when nobody maps or unmaps it",
    )


class _Pinning:
    """The sequence number of the memory says whether the pages seen after it are those that were pinned."""

    def __init__(self, mm: AddressSpace, what: str, start: int, npages: int) -> None:
        self.mm = mm
        self.what = what
        self.start = start
        self.end = start + npages * PAGE_SIZE
        self.before: PfnArray = np.zeros(npages, np.uint64)
        self.after: PfnArray = np.zeros(npages, np.uint64)
        self._sub: Any = None

    @contextmanager
    def notified(self) -> Iterator[None]:
        sub = ffi.new("pm_sub **")
        ret = lib.pm_sub_insert(self.mm.native, self.start, self.end - 1, 0, KIND_RANGE, sub)
        check(ret, self.what, addr=self.start)
        self._sub = ffi.gc(sub[0], lib.pm_sub_put)
        try:
            yield
        finally:
            lib.pm_sub_remove(self._sub)

    def attempt(self) -> Any:
        """A pin whose pfns are ``after``; None if other pages came meanwhile."""
        if not self._look(self.before, self._seq()):
            return None
        exchanged = self._exchanged()
        if exchanged is None:
            seq = self._seq()
            native = self._pin()
        else:
            # What an invalidation before it or after it does is seen by the number of this one.
            with self.mm._invalidation(*exchanged, Event.CLEAR) as change:
                native = self._pin()
            seq = change.seq
        if self._seq() != seq or not self._look(self.after, seq):
            lib.pm_pin_release(native)
            return None
        if exchanged is None:
            self._report_moved()
        return native

    def _seq(self) -> int:
        seq = ffi.new("uint64_t *")
        ret = wait_read_begin(self._sub, seq, _WAIT_S)
        check(ret, f"{self.what}: [{self.start:#x}, {self.end:#x}) is still being invalidated")
        return int(seq[0])

    def _look(self, pfns: PfnArray, seq: int) -> bool:
        """Read the page table; False if it changed meanwhile."""
        if "pagemap" not in self.mm.features:
            return True
        walk = ffi.new(
            "struct pm_walk *",
            {
                "start": self.start,
                "end": self.end,
                "pfns": ffi.from_buffer("uint64_t[]", pfns),
                "sub": self._sub,
                "seq": seq,
            },
        )
        ret = lib.pm_walk(self.mm.native, walk)
        if ret not in (0, -errno.EBUSY):
            raise error(-ret, self.what, addr=self.start, mm=self.mm)
        return bool(ret == 0)

    def _exchanged(self) -> tuple[int, int] | None:
        """From the first to the last present page that may be replaced by a copy; None: there is none."""
        if "pagemap" not in self.mm.features:
            return self.start, self.end
        (places,) = np.nonzero((self.before & _WRITABLE) == _VALID)
        if not places.size:
            return None
        first, last = int(places[0]), int(places[-1])
        return self.start + (first << PAGE_SHIFT), self.start + ((last + 1) << PAGE_SHIFT)

    def _pin(self) -> Any:
        made = ffi.new("pm_pin **")
        ret = lib.pm_pin_create(self.mm.native, self.start, self.before.size, made)
        if ret < 0:
            raise _failure(self.mm, self.what, ret, self.start, self.end)
        return ffi.gc(made[0], lib.pm_pin_put)

    def _report_moved(self) -> None:
        """Pages that the kernel moved out of a movable zone to pin them."""
        moved = ((self.before & _VALID) != 0) & ((self.before ^ self.after) & _PFN != 0)
        (places,) = np.nonzero(moved)
        if places.size:
            first, last = int(places[0]), int(places[-1])
            detected(self.mm, self.start + (first << PAGE_SHIFT), self.start + ((last + 1) << PAGE_SHIFT))


def _failure(mm: AddressSpace, what: str, ret: int, start: int, end: int) -> MirrorError:
    if ret == -errno.ENOMEM:
        return _no_memory(mm, what, start, end)
    if ret == -errno.ENOSPC:
        return error(errno.ENOSPC, f"{what}: no slot is left", hint="unpin something: there are 16,384 slots")
    if ret == -errno.ESRCH:
        mm._check_here(what)
    if ret not in (-errno.EFAULT, -errno.EOPNOTSUPP):
        return error(-ret, what, addr=start, mm=mm)
    addr, why, hint = _unpinnable(mm, start, end)
    return error(-ret, f"{what}: {why}", addr=addr, mm=mm, hint=hint)


def _unpinnable(mm: AddressSpace, start: int, end: int) -> tuple[int, str, str]:
    """The first address that cannot be pinned, why, and what to do."""
    at = start
    for vma in mm._walk(start, end):
        if at < vma.start:
            break
        if (found := _refusal(vma)) is not None:
            return at, *found
        at = vma.end
    if at < end and mm._vma_for_error(at) is None:
        return at, "a hole", "map it, or pin less"
    return start, "a page of it cannot be had", "see the vma and the length of its file, then go again"


def _refusal(vma: Vma) -> tuple[str, str] | None:
    if vma.special:
        return "a device's or the kernel's own pages", "pin memory that has pages of its own"
    if not vma.prot & mmap.PROT_WRITE:
        return "no permission to write, and FOLL_WRITE is asked for", "mprotect() it to permit that"
    if vma.shared and vma.file and not vma.hugetlb and not _is_shmem(vma):
        return (
            "a shared mapping of a file on disk: with FOLL_LONGTERM its pages would be written to behind"
            " the back of the file system",
            "pin a private mapping of it, a memfd or a file on tmpfs, or mirror it",
        )
    return None


def _is_shmem(vma: Vma) -> bool:
    return vma.name.startswith(("/memfd:", "/dev/zero", "/dev/shm/", "/SYSV", "[anon_shmem:"))


def _no_memory(mm: AddressSpace, what: str, start: int, end: int) -> MirrorError:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    asked = (end - start) >> 10
    if limit == resource.RLIM_INFINITY or _may_lock():
        why, hint = f"no memory to pin {asked} KiB", "free some memory, or pin less"
    else:
        why = (
            f"RLIMIT_MEMLOCK is {limit >> 10} KiB, this process has {_status_kib('VmPin')} KiB pinned, and"
            f" {asked} KiB are asked for (the limit is of all that a user's processes pin together)"
        )
        hint = f"{memlock_command()}   # or CAP_IPC_LOCK"
    return error(errno.ENOMEM, f"{what}: {why}", addr=start, mm=mm, hint=hint)


def _may_lock() -> bool:
    return bool(int(_status("CapEff"), 16) >> _CAP_IPC_LOCK & 1)


def _status_kib(name: str) -> int:
    return int(_status(name).split()[0])


def _status(name: str) -> str:
    """A line of /proc/self/status; 0 where it cannot be read."""
    try:
        with open("/proc/self/status") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith(name + ":"))
    except (OSError, StopIteration):
        return "0"
