# SPDX-License-Identifier: MIT
"""Migration out of device memory without an mm, by PFN: migrate_device_range(), _pages() and _finalize()."""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt

from ._shim import ffi, lib
from .affected import PAGE_SIZE
from .arguments import check_is, integer
from .device_memory import DeviceMemory
from .errors import MirrorError, check
from .lock import not_in_callback, not_under_driver_lock
from .migrate import bring_home, check_vram
from .migrate_pfn import MIGRATE_PFN_MIGRATE, MIGRATE_PFN_VALID, migrate_pfn
from .pfn import PfnArray

_U64 = np.uint64
Bools = npt.NDArray[np.bool_]


class MigrateDevice:
    """What migrate_device_range() found.

    ``src`` and ``dst`` are as in MigrateVma, ``addrs`` are the addresses of the pages, 0 where there is none.
    """

    def __init__(self, vram: DeviceMemory, src: PfnArray, addrs: PfnArray) -> None:
        self.vram = vram
        self.src = src
        self.dst: PfnArray = np.zeros(src.size, _U64)
        self.addrs = addrs

    def __repr__(self) -> str:
        return f"<MigrateDevice of {self.vram!r}, {np.count_nonzero(self.src)} pages>"


def migrate_device_range(vram: DeviceMemory, pfn: int, npages: int) -> MigrateDevice:
    """What is in npages pages of private device memory from a PFN on: to evict it, whoever it belongs to.

    ``vram.pfns`` is the range of its PFNs. ``src`` has MIGRATE_PFN_MIGRATE for pages in use. EINVAL: not all
    PFNs of it. ESRCH in a forked child; EDEADLK in a callback.
    """
    what = "migrate_device_range"
    not_in_callback(what)
    check_vram(what, vram)
    pfn, npages = integer(what, "pfn", pfn), integer(what, "npages", npages)
    with vram._lock:
        vram._check(what)
        pfns = vram.pfns
        if npages <= 0 or pfn not in pfns or pfn + npages > pfns.stop:
            raise MirrorError(
                errno.EINVAL, f"{what}: {npages} pages from PFN {pfn:#x}", hint=f"vram.pfns is {pfns}"
            )
        addrs = np.zeros(npages, _U64)
        buffer = ffi.from_buffer("uint64_t[]", addrs)
        check(lib.pm_devmem_addrs(vram._native, pfn, npages, buffer), what)
    entries = migrate_pfn(_U64(pfn) + np.arange(npages, dtype=_U64)) | _U64(MIGRATE_PFN_MIGRATE)
    return MigrateDevice(vram, np.where(addrs != 0, entries, _U64(0)), addrs)


def migrate_device_pages(args: MigrateDevice) -> int:
    """Bring home what has MIGRATE_PFN_MIGRATE in ``src`` and MIGRATE_PFN_VALID in ``dst``; gives how many.

    What did not come has the bit cleared in ``src``: it has moved meanwhile. Errors as migrate_to_system().
    """
    what = "migrate_device_pages"
    not_in_callback(what)
    _check_device_args(what, args)
    vram = args.vram
    not_under_driver_lock(what)
    asked = (args.src & _U64(MIGRATE_PFN_MIGRATE)) != 0
    asked &= (args.dst & _U64(MIGRATE_PFN_VALID)) != 0
    came = np.zeros(args.src.size, bool)
    with vram._lock:
        vram._check(what)
        mm = vram.mm
        for group in _neighbours(args.addrs, asked) if mm is not None else []:
            assert mm is not None
            start = int(args.addrs[group[0]])
            end = int(args.addrs[group[-1]]) + PAGE_SIZE
            before = vram.holds(start, end)
            bring_home(mm, what, start, end, vram._native, vram)
            came[group] = before & ~vram.holds(start, end)
    args.src[~came] &= _U64(~MIGRATE_PFN_MIGRATE & (1 << 64) - 1)
    return int(np.count_nonzero(came))


def migrate_device_finalize(args: MigrateDevice) -> None:
    """End it. There is nothing to give back here: it stands for the kernel's call of that name."""
    _check_device_args("migrate_device_finalize", args)


def _check_device_args(what: str, args: object) -> None:
    check_is(what, "args", args, "addrs", "what migrate_device_range() gave")


def _neighbours(addrs: PfnArray, asked: Bools) -> list[npt.NDArray[np.intp]]:
    """Indices of what is asked for, in order of address, cut where the next page is not the next address."""
    order = np.flatnonzero(asked)
    order = order[np.argsort(addrs[order], kind="stable")]
    if not order.size:
        return []
    return np.split(order, np.flatnonzero(np.diff(addrs[order]) != PAGE_SIZE) + 1)
