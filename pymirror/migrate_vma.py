# SPDX-License-Identifier: MIT
"""Migration in the kernel's three steps: migrate_vma_setup(), _pages() and _finalize().

    with migrate_vma_setup(mm, start, end, vram) as args:
        wanted = (args.src & MIGRATE_PFN_MIGRATE) != 0
        args.dst[:] = args.alloc_pages(wanted)
        migrate_vma_pages(args)                            # a cleared MIGRATE in args.src: the race was lost
        ...                                                # the device's page table
        migrate_vma_finalize(args)

The driver decides page by page. The copy that a driver makes between the first two steps is the move itself,
which the second step does: until then the CPU uses the page, and nothing that it writes is lost.
"""

from __future__ import annotations

import errno
import os
import threading
import warnings
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ._shim import ffi, lib
from .affected import PAGE_SIZE
from .arguments import check_is, integer
from .device_memory import DeviceMemory, coherent_pages
from .errors import MirrorError, check, error
from .lock import not_in_callback
from .migrate import check_handler, check_migration, check_vram, watch_movable
from .migrate_pfn import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from .ops import PROT_READ
from .pfn import HMM_PFN_VALID, HMM_PFN_WRITE, PfnArray, hmm_pfn_to_pfn, is_device_private_pfn
from .vma import find_vma

if TYPE_CHECKING:
    from .mm import AddressSpace
    from .vma import Vma

#: What migrate_vma_setup() collects.
MIGRATE_VMA_SELECT_SYSTEM = 1 << 0
MIGRATE_VMA_SELECT_DEVICE_PRIVATE = 1 << 1
MIGRATE_VMA_SELECT_DEVICE_COHERENT = 1 << 2

_FILE, _PRESENT, _SWAPPED = 1 << 61, 1 << 63, 1 << 62
_U64 = np.uint64
Bools = npt.NDArray[np.bool_]


class MigrateVma:
    """``struct migrate_vma``: a migration that has begun. Made by migrate_vma_setup(); a context manager.

    ``src`` and ``dst`` are uint64, one a 4 KiB page of [start, end), with the bits MIGRATE_PFN_*; the driver
    fills ``dst``. ``cpages`` is how many can migrate, ``npages`` how many pages there are.
    """

    def __init__(self, mm: AddressSpace, start: int, end: int, vram: DeviceMemory, flags: int) -> None:
        self.mm = mm
        self.vram = vram
        self.start = start
        self.end = end
        self.flags = flags
        self.npages = (end - start) // PAGE_SIZE
        self.src: PfnArray = np.zeros(self.npages, _U64)
        self.dst: PfnArray = np.zeros(self.npages, _U64)
        self.cpages = 0
        self.finalized = True  # until migrate_vma_setup() has collected
        self._thread = threading.get_ident()
        self._reserved: list[PfnArray] = []
        self._stack = ExitStack()

    @property
    def pgmap_owner(self) -> object:
        """The owner of the device memory, which the MIGRATE event carries."""
        return self.vram.owner

    def alloc_pages(self, wanted: Bools) -> PfnArray:
        """Entries of ``dst``: pages of the device memory where wanted (bool, one a page), 0 where it is full.

        The memory that they take is given back by migrate_vma_finalize() if nothing migrates there. EINVAL
        for memory that is coherent: its pages are found by the migration, MIGRATE_PFN_VALID asks for one.
        EDEADLK in a callback.
        """
        not_in_callback("MigrateVma.alloc_pages")
        _check_open(self, "MigrateVma.alloc_pages")
        if self.vram.kind != "private":
            raise MirrorError(
                errno.EINVAL,
                "MigrateVma.alloc_pages: pages of coherent memory are not chosen",
                hint="dst[i] = MIGRATE_PFN_VALID",
            )
        pfns = np.zeros(self.npages, _U64)
        ask = np.ascontiguousarray(wanted, np.uint8)
        if ask.size != self.npages:
            raise MirrorError(
                errno.EINVAL,
                f"MigrateVma.alloc_pages: {ask.size} elements for {self.npages} pages",
                hint="give a bool for each page of [start, end)",
            )
        ret = lib.pm_devmem_alloc(
            self.vram._native,
            self.start,
            self.npages,
            ffi.from_buffer("uint8_t[]", ask),
            ffi.from_buffer("uint64_t[]", pfns),
        )
        check(ret, "MigrateVma.alloc_pages", addr=self.start, mm=self.mm)
        self._reserved.append(pfns)
        return np.where(pfns != 0, migrate_pfn(pfns), _U64(0))

    def __enter__(self) -> MigrateVma:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        migrate_vma_finalize(self)

    def __del__(self) -> None:
        if getattr(self, "finalized", True) or self.mm.pid != os.getpid():
            return
        text = f"{self!r} was collected unfinalized: migrate_vma_finalize() it"
        warnings.warn(text, ResourceWarning, source=self, stacklevel=2)
        migrate_vma_finalize(self)

    def __repr__(self) -> str:
        state = "finalized" if self.finalized else f"{self.cpages} of {self.npages} pages"
        return f"<MigrateVma {self.start:#x}-{self.end:#x}, {state}>"


def migrate_vma_setup(
    mm: AddressSpace,
    start: int,
    end: int,
    vram: DeviceMemory,
    *,
    flags: int = MIGRATE_VMA_SELECT_SYSTEM,
) -> MigrateVma:
    """Collect what of [start, end), in one vma, can migrate: to ``vram``, or, with other flags, out of it.

    It is the range that MIGRATE invalidates, with the memory's owner, until migrate_vma_finalize().
    Never-touched and zero pages have MIGRATE_PFN_MIGRATE without MIGRATE_PFN_VALID. EINVAL: no interval of
    whole pages, a hole, more than one vma, memory that is unreadable, special or of hugetlb, no flags. Other
    errors as migrate_to_device(). Finish it, also after an error: use it as a context manager.
    """
    what = "migrate_vma_setup"
    check_migration(mm, what, start, end)
    vma = _vma_of(mm, what, start, end)
    if vma.hugetlb or vma.special or not vma.prot & PROT_READ:
        raise error(errno.EINVAL, f"{what}: memory that does not migrate", addr=start, mm=mm)
    check_vram(what, vram)
    flags = integer(what, "flags", flags)
    if not flags or flags & ~7:
        raise MirrorError(errno.EINVAL, f"{what}: flags {flags:#x}", hint="some of MIGRATE_VMA_SELECT_*")
    args = MigrateVma(mm, start, end, vram, flags)
    with ExitStack() as stack:
        stack.enter_context(vram._serving(mm, what))
        watch_movable(mm, start, end)
        stack.enter_context(mm._migrating(what, start, end, vram.owner))
        _collect(args, vma)
        args._stack = stack.pop_all()
        args.finalized = False
    return args


def _vma_of(mm: AddressSpace, what: str, start: int, end: int) -> Vma:
    """The vma of an interval. What migration has split off itself still counts as a part of it."""
    at, found = start, None
    for vma in mm._walk(start, end):
        kind = (vma.prot, vma.shared, vma.dev, vma.inode, vma.special, vma.hugetlb)
        if vma.start > at or (found and found != kind):
            break
        at, found = vma.end, kind
    first = find_vma(mm.native, start)
    if at < end or first is None:
        raise error(errno.EINVAL, f"{what}: not in one vma", addr=start, mm=mm, hint="migrate vma by vma")
    return first


def _collect(args: MigrateVma, vma: Vma) -> None:
    pfns, raw = _look(args)
    valid = (pfns & _U64(HMM_PFN_VALID)) != 0
    zero = args.mm.features.zero_pfn
    own = is_device_private_pfn(pfns)
    held = args.vram.holds(args.start, args.end)
    coherent = coherent_pages(args.mm, args.start, args.end)
    system = np.zeros(args.npages, bool)
    empty = np.zeros(args.npages, bool)
    if args.flags & MIGRATE_VMA_SELECT_SYSTEM and not vma.shared:
        absent = (raw & _U64(_PRESENT | _SWAPPED)) == 0
        empty = (absent & ~own & ~_elsewhere(args)) | (valid & (hmm_pfn_to_pfn(pfns) == zero) & bool(zero))
        empty &= not vma.file
        system = valid & ~own & ~coherent & ~empty & ((raw & _U64(_FILE)) == 0)
    if args.flags & MIGRATE_VMA_SELECT_DEVICE_PRIVATE:
        system |= own & held
    if args.flags & MIGRATE_VMA_SELECT_DEVICE_COHERENT:
        system |= coherent & held
    write = (pfns & _U64(HMM_PFN_WRITE)) != 0
    entries = migrate_pfn(hmm_pfn_to_pfn(pfns)) | _U64(MIGRATE_PFN_MIGRATE)
    args.src[system] = entries[system]
    args.src[system & write] |= _U64(MIGRATE_PFN_WRITE)
    args.src[empty] = MIGRATE_PFN_MIGRATE
    args.cpages = int(np.count_nonzero(args.src))


def _look(args: MigrateVma) -> tuple[PfnArray, PfnArray]:
    """HMM pfns, as the owner sees them, and raw entries of the pagemap."""
    mm, pfns, raw = args.mm, np.zeros(args.npages, _U64), np.zeros(args.npages, _U64)
    walk = ffi.new("struct pm_walk *", {"start": args.start, "end": args.end, "owner": id(args.vram.owner)})
    walk.pfns = buffer = ffi.from_buffer("uint64_t[]", pfns)
    check(lib.pm_walk(mm.native, walk), "migrate_vma_setup", addr=args.start, mm=mm)
    del buffer
    entries = ffi.from_buffer("uint64_t[]", raw)
    ret = lib.pm_pagemap_read(mm.native, args.start, args.npages, entries)
    check(ret, "migrate_vma_setup", addr=args.start, mm=mm)
    return pfns, raw


def _elsewhere(args: MigrateVma) -> Bools:
    """Pages that are in some device memory."""
    away: Bools = np.zeros(args.npages, bool)
    for memory in [*args.mm._device_memory]:
        away |= memory.holds(args.start, args.end)
    return away


def migrate_vma_pages(args: MigrateVma) -> int:
    """Move the pages that have MIGRATE_PFN_MIGRATE in ``src`` to what ``dst`` has for them; gives how many.

    What did not move has the bit cleared: ``dst`` was 0, or the race was lost (the page has been pinned or
    locked, went elsewhere, or its vma has gone or cannot be read any more). A page that was discarded
    meanwhile (MADV_DONTNEED) moves as one that was never touched. To the system any entry with
    MIGRATE_PFN_VALID asks for a page of the kernel's choice. EBUSY with inline delivery
    as migrate_to_device(); EINVAL: finalized, or a PFN of ``dst`` that alloc_pages() has not given, or that
    is there twice.
    """
    what = "migrate_vma_pages"
    not_in_callback(what)
    _check_open(args, what)
    asked = (args.src & _U64(MIGRATE_PFN_MIGRATE)) != 0
    asked &= (args.dst & _U64(MIGRATE_PFN_VALID)) != 0
    held = args.vram.holds(args.start, args.end)
    moved = np.zeros(args.npages, bool)
    moved |= _home(args, what, asked & held)
    moved |= _away(args, what, asked & ~held)
    args.src[~moved] &= _U64(~MIGRATE_PFN_MIGRATE & (1 << 64) - 1)
    return int(np.count_nonzero(moved))


def _away(args: MigrateVma, what: str, asked: Bools) -> Bools:
    if args.vram.kind == "coherent":
        for first, last in _runs(asked):
            moved = ffi.new("uint64_t *")
            addr = args.start + first * PAGE_SIZE
            end = args.start + last * PAGE_SIZE
            check(lib.pm_migrate_to_device(args.vram._native, addr, end, moved), what, addr=addr, mm=args.mm)
        return asked & args.vram.holds(args.start, args.end)
    pfns = np.where(asked, migrate_pfn_to_pfn(args.dst), _U64(0))
    wrong = (pfns != 0) & ~_chosen_well(args, pfns)
    if wrong.any():
        addr = args.start + int(np.flatnonzero(wrong)[0]) * PAGE_SIZE
        text = f"{what}: dst is no page of {args.vram!r} that was given for this migration, or is twice there"
        raise error(errno.EINVAL, text, addr=addr, mm=args.mm, hint="alloc_pages() gives them")
    ret_moved = np.zeros(args.npages, np.uint8)
    ret = lib.pm_migrate_pages(
        args.vram._native,
        args.start,
        args.npages,
        ffi.from_buffer("uint64_t[]", pfns),
        ffi.from_buffer("uint8_t[]", ret_moved),
    )
    if ret == -errno.EBUSY:
        check_handler(args.mm, what)
    check(ret, what, addr=args.start, mm=args.mm)
    return ret_moved.astype(np.bool_)


def _chosen_well(args: MigrateVma, pfns: PfnArray) -> Bools:
    """Which PFNs alloc_pages() has given, each where it stands first."""
    well: Bools = np.zeros(pfns.size, bool)
    well[np.unique(pfns, return_index=True)[1]] = True
    given = np.concatenate(args._reserved) if args._reserved else np.zeros(0, _U64)
    return well & np.isin(pfns, given)


def _home(args: MigrateVma, what: str, asked: Bools) -> Bools:
    for first, last in _runs(asked):
        moved = ffi.new("uint64_t *")
        addr, end = args.start + first * PAGE_SIZE, args.start + last * PAGE_SIZE
        ret = lib.pm_migrate_to_system(args.mm.native, addr, end, args.vram._native, moved)
        check(ret, what, addr=addr, mm=args.mm)
    return asked & ~args.vram.holds(args.start, args.end)


def migrate_vma_finalize(args: MigrateVma) -> None:
    """End it: the invalidation is over, pages of the device that nothing moved to are free. Idempotent.

    EDEADLK: another thread began it, which holds the locks, and has to end it.
    """
    _check_args("migrate_vma_finalize", args)
    if args.finalized:
        return
    if args._thread != threading.get_ident():
        raise error(
            errno.EDEADLK,
            "migrate_vma_finalize: another thread holds its locks",
            addr=args.start,
            mm=args.mm,
            hint="finalize in the thread that called migrate_vma_setup(), with a with block for one",
        )
    args.finalized = True
    try:
        for pfns in args._reserved:
            lib.pm_devmem_free(args.vram._native, pfns.size, ffi.from_buffer("uint64_t[]", pfns))
    finally:
        args._stack.close()


def _runs(asked: Bools) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], asked, [False])).astype(np.int8)))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


def _check_args(what: str, args: object) -> None:
    check_is(what, "args", args, "finalized", "what migrate_vma_setup() gave")


def _check_open(args: MigrateVma, what: str) -> None:
    _check_args(what, args)
    if args.finalized:
        raise MirrorError(
            errno.EINVAL, f"{what}: {args!r}", addr=args.start, hint="begin with migrate_vma_setup()"
        )
