# SPDX-License-Identifier: MIT
"""Migration between system memory and device memory (migrate_vma_*(), in one call a direction).

The pages themselves move (UFFDIO_MOVE), between a hole and a hole, without a copy; on a kernel without that
they are copied. Drivers are told before:
event MIGRATE with the owner of the device memory, so that the driver that migrates can leave its own alone.
"""

from __future__ import annotations

import errno
import signal
from typing import TYPE_CHECKING

from ._shim import ffi, lib
from .affected import USER_END
from .arguments import check_is, check_mm
from .errors import MirrorError, check
from .features import memlock_command
from .mm_base import check_pages
from .ops import PROT_READ
from .other_userfaultfd import vma_of_other_userfaultfd

if TYPE_CHECKING:
    from .device_memory import DeviceMemory
    from .mm import AddressSpace


def migrate_to_device(mm: AddressSpace, start: int, end: int, vram: DeviceMemory) -> int:
    """Move the pages of [start, end) into device memory; gives how many moved.

    Private anonymous memory moves, never-touched pages too, for which nothing is copied, and of private
    mappings of files the pages that are copies of this process's own. Shared, hugetlb and other file memory
    stays, and so do pinned pages and what is in device memory already (docs/device-memory.md, "What moves").
    Pages shared with a forked child get copies of their own first. When the device memory is full, what was
    moved in least recently goes home.

    EINVAL: no interval of whole pages, or, after what precedes it has moved, a hole or a vma that cannot be
    read. ENOSPC: it is larger than the device memory. EBUSY: a fork or madvise of another thread does not
    end; a handler of SIGBUS or SIGSEGV was installed over pymirror's, which has one of SIGBUS with inline
    delivery and one of SIGSEGV once copies of a file have moved; or no page has moved, and another
    userfaultfd has the memory. EXDEV: the device memory has pages of another address space.
    EOPNOTSUPP, FeatureError: this kernel or user cannot have device memory. ENOMEM: also locked memory beyond
    RLIMIT_MEMLOCK; ESRCH; EDEADLK in a callback, under a driver lock and under read_lock().
    """
    what = "migrate_to_device"
    check_migration(mm, what, start, end)
    check_vram(what, vram)
    moved, total = ffi.new("uint64_t *"), 0
    with vram._serving(mm, what) as native:
        watched = watch_movable(mm, start, end)
        while True:
            with mm._migrating(what, start, end, vram.owner):
                ret = lib.pm_migrate_to_device(native, start, end, moved)
            total += moved[0]
            if ret != -errno.ENOSPC:
                break
            _evict(mm, vram, start, end, total)
    if ret == -errno.EBUSY:
        check_handler(mm, what)
    hint = f"free some memory; for locked memory: {memlock_command()}" if ret == -errno.ENOMEM else None
    check(ret, what, addr=_first_refused(mm, start, end) if ret == -errno.EINVAL else start, mm=mm, hint=hint)
    if not total and watched < end - start:
        check_other_userfaultfd(mm, what, start, end)
    return int(total)


def migrate_to_system(mm: AddressSpace, start: int, end: int, vram: DeviceMemory | None = None) -> int:
    """Bring home the pages of [start, end) that are in ``vram``, without it in any; gives how many.

    EINVAL; EAGAIN: another thread's munmap, madvise or fork did not end for 5 s; ENOMEM; ESRCH; EDEADLK in a
    callback, under a driver lock and under read_lock().
    """
    what = "migrate_to_system"
    check_migration(mm, what, start, end)
    if vram is None:
        return bring_home(mm, what, start, end, ffi.NULL, None)
    check_vram(what, vram)
    with vram._lock:
        vram._check(what)
        if vram.mm is mm:
            return bring_home(mm, what, start, end, vram._native, vram)
        with mm._migrating(what, start, end, vram.owner):
            return 0


def watch_movable(mm: AddressSpace, start: int, end: int) -> int:
    """Watch what may move, private mappings of files too; gives the bytes that are watched but for these."""
    if lib.pm_watch_has(mm.native, start, end) == 1:
        return end - start
    watched = mm.watch(start, end)
    for vma in mm._walk(start, end):
        if vma.file and not vma.shared:
            mm.watch(max(start, vma.start), min(end, vma.end), files=True)
    return watched


def bring_home(
    mm: AddressSpace, what: str, start: int, end: int, native: object, vram: DeviceMemory | None
) -> int:
    moved = ffi.new("uint64_t *")
    with mm._migrating(what, start, end, vram.owner if vram is not None else None):
        ret = lib.pm_migrate_to_system(mm.native, start, end, native, moved)
    check(ret, what, addr=start, mm=mm)
    return int(moved[0])


def _evict(mm: AddressSpace, vram: DeviceMemory, start: int, end: int, moved: int) -> None:
    """Make room for the rest of a migration of [start, end), whose own pages stay."""
    victim = vram._oldest()
    if victim is None or (victim[0] < end and start < victim[1]):
        raise MirrorError(
            errno.ENOSPC,
            f"migrate_to_device: {vram!r} has no room for [{start:#x}, {end:#x}); {moved} pages have moved",
            addr=start,
            vma=mm._vma_for_error(start),
            hint="make the device memory larger, or migrate less at a time",
        )
    bring_home(mm, "migrate_to_device", *victim, vram._native, vram)


def check_handler(mm: AddressSpace, what: str) -> None:
    """EBUSY while another handler would get the faults of inline delivery, or those of guarded pages."""
    for number in (signal.SIGBUS, signal.SIGSEGV):
        if not (handler := lib.pm_handler_over(number)):
            continue
        raise MirrorError(
            errno.EBUSY,
            f"{what}: a handler of {number.name} was installed over pymirror's, and would get its faults",
            addr=handler,
            vma=mm._vma_for_error(handler),
            hint="take it away (faulthandler.disable()); install it before the first migration, then it gets"
            " what is not pymirror's",
        )


def check_other_userfaultfd(mm: AddressSpace, what: str, start: int, end: int) -> None:
    """EBUSY where a vma of [start, end) is registered with a userfaultfd that is not this address space's."""
    vma = vma_of_other_userfaultfd(mm, start, end)
    if vma is None:
        return
    addr = max(start, vma.start)
    raise MirrorError(
        errno.EBUSY,
        f"{what}: another userfaultfd of this process has this memory, and a vma can have but one",
        addr=addr,
        vma=vma,
        hint="end the other registration (UFFDIO_UNREGISTER, or close the other AddressSpace), or leave this"
        " memory out",
    )


def check_vram(what: str, vram: object) -> None:
    """EINVAL for what is no device memory."""
    check_is(what, "vram", vram, "_pointer", "the DeviceMemory of a device")


def check_migration(mm: AddressSpace, what: str, start: int, end: int) -> None:
    check_mm(what, mm)
    mm._check(what)
    mm._mmap_lock.check_free(what)
    check_pages(mm, what, start, end)
    if end > USER_END:
        raise MirrorError(
            errno.EINVAL, f"{what}: {end:#x} is beyond user memory", hint="give less than 1 << 47"
        )


def _first_refused(mm: AddressSpace, start: int, end: int) -> int:
    at = start
    for vma in mm._walk(start, end):
        if vma.start > at or not vma.prot & PROT_READ:
            break
        at = vma.end
    return min(at, end - 1)
