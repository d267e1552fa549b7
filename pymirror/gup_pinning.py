# SPDX-License-Identifier: MIT
"""How pages get pinned: who must be told, which pages they are, and why it failed.

What native code makes is put back by a holder that is there before: Ctrl-C may strike right after the call.
"""

from __future__ import annotations

import errno
import mmap
import resource
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from . import trace
from ._shim import ffi, lib
from .dump import in_the_way
from .errors import MirrorError, error
from .event import Event
from .features import memlock_command
from .migrate import migrate_to_system
from .pfn import HMM_PFN_VALID, HMM_PFN_WRITE
from .vma import Vma
from .walk import PAGE_SHIFT, PAGE_SIZE, detected, walk_error

if TYPE_CHECKING:
    from .mm import AddressSpace
    from .pfn import PfnArray

_ATTEMPTS = 16
_WAIT_S = 1.0
#: Pages from which on a look at the vmas comes first: an array for all of an address space is no request.
_LOOK_FIRST = 1 << 18
_CAP_IPC_LOCK = 14

#: Kernel mounts of shmem that are in no list of mounts, and those that are.
_SHMEM_NAMES = ("/memfd:", "/dev/zero", "/SYSV", "[anon_shmem:")
_MEMORY_FILE_SYSTEMS = ("tmpfs", "devtmpfs", "ramfs")

_HINTS = {
    errno.EMFILE: "ulimit -n 4096   # or close descriptors: the first pin takes two",
    errno.ENFILE: "close descriptors, or raise /proc/sys/fs/file-max",
}

_HELD = HMM_PFN_VALID | HMM_PFN_WRITE


def pin_pages(mm: AddressSpace, what: str, start: int, npages: int) -> tuple[Any, PfnArray]:
    """A ``pm_pin **`` that holds the pin, and the pfns of its pages."""
    end = start + npages * PAGE_SIZE
    _leave_coherent(mm, start, end)
    with mm._operation(what, start, end, write=False, track=trace.Track.PIN):
        mm.features.require("io_uring", what)
        if npages > _LOOK_FIRST:
            _check_vmas(mm, what, start, end)
        mm.watch(start, end)
        if "pagemap" in mm.features:
            return _Pinning(mm, what, start, npages).pin()
        return _pin_unseen(mm, what, start, npages)


def _leave_coherent(mm: AddressSpace, start: int, end: int) -> None:
    """FOLL_LONGTERM: pages of device-coherent memory become system memory first, as in the kernel."""
    for vram in list(mm._device_memory):
        if vram.kind == "coherent" and vram.mm is mm:
            migrate_to_system(mm, start, end, vram)


class _Pinning:
    """Pages that are pinned in one native call, which sees what they are, and what is done in its way."""

    def __init__(self, mm: AddressSpace, what: str, start: int, npages: int) -> None:
        self.mm = mm
        self.what = what
        self.start = start
        self.end = start + npages * PAGE_SIZE
        self.pfns: PfnArray = np.empty(npages, np.uint64)
        self._request = ffi.new("struct pm_pinning *")
        self._request.start, self._request.npages = start, npages
        self._request.pfns = ffi.from_buffer("uint64_t[]", self.pfns)
        self._held = _holder()

    def pin(self) -> tuple[Any, PfnArray]:
        for _ in range(_ATTEMPTS):
            ret = self._attempt()
            changed = self._request.changed_start, self._request.changed_end
            if ret == 0:
                if changed[0] != changed[1]:
                    # The kernel moved them out of a movable zone.
                    detected(self.mm, *changed)
                return self._held, self.pfns
            if ret == -errno.EAGAIN and changed[0] != changed[1]:
                self._replace(*changed)
            elif ret != -errno.EBUSY:
                raise _failure(self.mm, self.what, ret, self.start, self.end)
        raise error(
            errno.EBUSY,
            f"{self.what}: [{self.start:#x}, {self.end:#x}) was exchanged meanwhile, {_ATTEMPTS} times",
            addr=self.start,
            mm=self.mm,
            hint="pin it when nobody maps or unmaps it",
        )

    def _attempt(self) -> int:
        deadline = time.monotonic() + _WAIT_S
        while (ret := int(lib.pm_pin_create(self.mm.native, self._request, self._held))) == -errno.EINTR:
            if time.monotonic() > deadline:
                return -errno.ETIMEDOUT
        return ret

    def _replace(self, start: int, end: int) -> None:
        """Give pages that are shared copy-on-write copies of their own, as the pin would: announced first."""
        _check_vmas(self.mm, self.what, self.start, self.end)
        with self.mm._invalidation(start, end, Event.CLEAR):
            _pin_and_forget(self.mm, self.what, start, end)
        # What cannot be seen to be replaced is not asked for again.
        self._request.flags = lib.PM_PIN_REPLACE


def _pin_unseen(mm: AddressSpace, what: str, start: int, npages: int) -> tuple[Any, PfnArray]:
    """Without the page table nobody knows what is shared: all of it is announced."""
    with mm._invalidation(start, start + npages * PAGE_SIZE, Event.CLEAR):
        held = _native_pin(mm, what, start, npages)
    return held, np.full(npages, _HELD, np.uint64)


def _native_pin(mm: AddressSpace, what: str, start: int, npages: int) -> Any:
    held = _holder()
    request = ffi.new("struct pm_pinning *", {"start": start, "npages": npages})
    ret = lib.pm_pin_create(mm.native, request, held)
    if ret < 0:
        raise _failure(mm, what, ret, start, start + npages * PAGE_SIZE)
    return held


def _pin_and_forget(mm: AddressSpace, what: str, start: int, end: int) -> None:
    ffi.release(_native_pin(mm, what, start, (end - start) >> PAGE_SHIFT))


def _holder() -> Any:
    return ffi.gc(ffi.new("pm_pin **"), _put)


def _put(held: Any, null: Any = ffi.NULL, put: Any = lib.pm_pin_put) -> None:
    if held[0] != null:
        put(held[0])


def _failure(mm: AddressSpace, what: str, ret: int, start: int, end: int) -> MirrorError:
    if ret == -errno.ENOMEM:
        return _no_memory(mm, what, start, end)
    if ret == -errno.ENOSPC:
        return error(errno.ENOSPC, f"{what}: no slot is left", hint="unpin something: there are 16,384 slots")
    if ret == -errno.ESRCH:
        mm._check_here(what)
    if ret == -errno.ETIMEDOUT:
        return _not_quiet(mm, what, start, end)
    if ret not in (-errno.EFAULT, -errno.EOPNOTSUPP):
        return error(-ret, what, addr=start, mm=mm, hint=_HINTS.get(-ret))
    if ret == -errno.EOPNOTSUPP:
        mm.features.require("io_uring", what)
    _check_vmas(mm, what, start, end)
    return _page_failure(mm, what, start, end)


def _not_quiet(mm: AddressSpace, what: str, start: int, end: int) -> MirrorError:
    running = "; ".join(in_the_way(mm, start, end)) or "it has ended by now"
    return error(
        errno.ETIMEDOUT,
        f"{what}: [{start:#x}, {end:#x}) was invalid for {_WAIT_S:g} s: {running}",
        addr=start,
        mm=mm,
        hint="pin it when that is over; a migration in steps ends with migrate_vma_finalize()",
    )


def _check_vmas(mm: AddressSpace, what: str, start: int, end: int) -> None:
    """EFAULT where the vmas say that not all of it can be pinned."""
    if (found := _unpinnable(mm, start, end)) is not None:
        addr, why, hint = found
        raise error(errno.EFAULT, f"{what}: {why}", addr=addr, mm=mm, hint=hint)


def _page_failure(mm: AddressSpace, what: str, start: int, end: int) -> MirrorError:
    """The vmas permit it: the first page that cannot be faulted in."""
    pfns = np.empty((end - start) >> PAGE_SHIFT, np.uint64)
    request = {
        "pfns": ffi.from_buffer("uint64_t[]", pfns),
        "default_flags": _HELD,
        "flags": lib.PM_WALK_FAULT,
    }
    walk = ffi.new("struct pm_walk *", {"start": start, "end": end, **request})
    with mm._invalidation(start, end, Event.CLEAR):  # faulting for writing replaces what is shared
        ret = lib.pm_walk(mm.native, walk)
    if ret == -errno.EFAULT:
        return walk_error(mm, walk, ret, what)
    hint = "it was changed meanwhile, or is of a kind that the kernel does not pin for long: see the vma"
    return error(errno.EFAULT, f"{what}: a page cannot be pinned", addr=start, mm=mm, hint=hint)


def _unpinnable(mm: AddressSpace, start: int, end: int) -> tuple[int, str, str] | None:
    """The first address that cannot be pinned, by its vma: why, and what to do."""
    at = start
    for vma in mm._walk(start, end):
        if at < vma.start:
            break
        if (found := _refusal(vma)) is not None:
            return at, *found
        at = vma.end
    return (at, "a hole", "map it, or pin less") if at < end else None


def _refusal(vma: Vma) -> tuple[str, str] | None:
    if vma.special:
        return "a device's or the kernel's own pages", "pin memory that has pages of its own"
    if not vma.prot & mmap.PROT_WRITE:
        return "no permission to write, and FOLL_WRITE is asked for", "mprotect() it to permit that"
    if vma.name.startswith("/secretmem"):
        return "secret memory, which the kernel does not let anybody pin", "use other memory"
    if vma.shared and vma.file and not vma.hugetlb and not _is_shmem(vma):
        return (
            "a shared mapping of a file on disk: with FOLL_LONGTERM its pages would be written to behind"
            " the back of the file system",
            "pin a private mapping of it, a memfd or a file on tmpfs, or mirror it",
        )
    return None


def _is_shmem(vma: Vma) -> bool:
    return vma.name.startswith(_SHMEM_NAMES) or _file_system(vma.dev) in _MEMORY_FILE_SYSTEMS


def _file_system(dev: tuple[int, int]) -> str:
    """The type of what is mounted from a device, "" where /proc does not tell."""
    with suppress(OSError), open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == f"{dev[0]}:{dev[1]}":
                return rest.split()[0]
    return ""


def _no_memory(mm: AddressSpace, what: str, start: int, end: int) -> MirrorError:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    asked = (end - start) >> 10
    if limit == resource.RLIM_INFINITY or _may_lock():
        why, hint = f"no memory to pin {asked} KiB at {start:#x}", "free some memory, or pin less"
    else:
        why = (
            f"RLIMIT_MEMLOCK is {limit >> 10} KiB, this process has {_status_kib('VmPin')} KiB pinned, and"
            f" {asked} KiB are asked for at {start:#x} (the limit is of all that a user's"
            " processes pin together, and of a few pages for each ring)"
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
