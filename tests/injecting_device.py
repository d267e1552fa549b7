# SPDX-License-Identifier: MIT
"""Operations on device memory, on DMA mappings and of the drivers, whose system calls are made to fail."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from injecting import (
    HUGE,
    Operation,
    Space,
    device_read,
    device_write,
    foreign_unmap,
    foreign_zap,
    fork,
    map_all,
    move,
    protect,
    unmap,
    zap,
    zapped,
)
from mirroring import FAULT, PAGE, WRITE, FaultDriver, filled
from seams import foreign

import pymirror as pm
from pymirror.drivers.dmirror import Dmirror, Quirks
from pymirror.drivers.odp import IB_ACCESS_LOCAL_WRITE, IB_ACCESS_ON_DEMAND, IB_ACCESS_REMOTE_READ, Odp
from pymirror.drivers.pinned import Pinned
from pymirror.drivers.svm import Svm
from pymirror.drivers.userptr import Read, Userptr, Write

PAGES = 8
KiB64 = 64 << 10
TO = pm.DMA_TO_DEVICE
#: A migration that was refused what it needs may say so in its own words.
MOVES = frozenset({errno.EBUSY, errno.EAGAIN, errno.ENOMEM})
#: ... and where no vma could be found there is none.
TAKES = MOVES | {errno.EFAULT}


@dataclass
class DeviceSpace(Space):
    """With device memory, in which pages 0 to 7 may be."""

    vram: pm.DeviceMemory = field(kw_only=True)

    def books(self) -> None:
        stats = self.mm.stats()
        used = self.vram.used if self.vram.kind == "private" else 0
        assert stats["device_resident"] == used // PAGE
        assert stats["device_child_lost"] == 0

    def end(self) -> int:
        return self.page(PAGES)


@contextmanager
def device_space(delivery: str = "thread", kind: str = "private", pages: int = 64) -> Iterator[DeviceSpace]:
    with (
        pm.AddressSpace(fault_delivery=delivery) as mm,
        FaultDriver(mm) as driver,
        pm.DeviceMemory(driver.device, pages * PAGE, kind=kind) as vram,
    ):
        buf = filled(mm, PAGES)
        yield DeviceSpace(mm, driver, buf, bytearray(bytes(buf)), vram=vram)
        assert not mm.errors


def there(space: Any) -> None:
    assert pm.migrate_to_device(space.mm, space.buf.addr, space.end(), space.vram) == PAGES


def _to_device(space: Any) -> None:
    pm.migrate_to_device(space.mm, space.buf.addr, space.end(), space.vram)


def _to_system(space: Any) -> None:
    pm.migrate_to_system(space.mm, space.buf.addr, space.end(), space.vram)


def _none_there(space: Any) -> None:
    assert not space.vram.holds(space.buf.addr, space.end()).any()


def _touch(space: Any) -> None:
    assert ctypes.string_at(space.page(3), PAGE) == space.expected[3 * PAGE : 4 * PAGE]


def _store(space: Any) -> None:
    ctypes.memset(space.page(3) + 5, 9, 10)
    space.expected[3 * PAGE + 5 : 3 * PAGE + 15] = bytes([9]) * 10


def _foreign_move(space: Any) -> None:
    place = foreign.mmap(0, PAGE)
    assert foreign.mremap(space.page(2), PAGE, PAGE, 3, place) == place
    space.gone = True
    assert ctypes.string_at(place, PAGE) == bytes(space.expected[2 * PAGE : 3 * PAGE])
    foreign.munmap(place, PAGE)
    space.mm.sync()


def _eviction(space: Any) -> None:
    """Four pages have room: those that come later make it."""
    start = space.made[0].addr + HUGE
    pm.migrate_to_device(space.mm, start, start + 4 * PAGE, space.vram)
    pm.migrate_to_device(space.mm, space.page(0), space.page(4), space.vram)
    assert ctypes.string_at(start, 4 * PAGE) == bytes([3]) * 4 * PAGE


def _four_pages(space: Any) -> None:
    space.made.append(space.mm.mmap(2 * HUGE))
    ctypes.memset(space.made[0].addr + HUGE, 3, 4 * PAGE)


def _in_steps(space: Any) -> None:
    with pm.migrate_vma_setup(space.mm, space.buf.addr, space.end(), space.vram) as args:
        args.dst[:] = args.alloc_pages(args.src != 0)
        pm.migrate_vma_pages(args)
        pm.migrate_vma_finalize(args)


def _evict_by_pfn(space: Any) -> None:
    pfns = space.vram.pfns
    args = pm.migrate_device_range(space.vram, pfns.start, len(pfns))
    args.dst[:] = pm.MIGRATE_PFN_VALID
    try:
        pm.migrate_device_pages(args)
    finally:
        pm.migrate_device_finalize(args)


def _exclusive(space: Any) -> None:
    with pm.make_device_exclusive(space.mm, space.page(2), space.driver.device) as one:
        assert one.pfns[0]


def _exclusive_range(space: Any) -> None:
    pm.make_device_exclusive_range(space.mm, space.buf.addr, space.end(), space.driver.device)


def _atomic(space: Any) -> None:
    """Exclusive access, an atomic through it, and a touch of the CPU that ends it."""
    mm, device, addr = space.mm, space.driver.device, space.page(4)
    sub = pm.IntervalNotifier(mm, addr, PAGE, partial(_clears, device))
    try:
        with pm.make_device_exclusive(mm, addr, device) as one:
            if not device.page_table.map(sub, sub.read_begin(), addr, one.pfns):
                return
            before = device.atomic_add(mm, addr, 1)
            number = (before + 1).to_bytes(8, "little")
            space.expected[4 * PAGE : 4 * PAGE + 8] = number
            assert ctypes.string_at(addr, 8) == number
    finally:
        sub.remove()


def _clears(device: pm.Device, sub: Any, update: Any, seq: int) -> bool:
    sub.set_seq(seq)
    device.page_table.clear(update.start, update.end)
    return True


def _memory(kind: str) -> Callable[[Any], None]:
    def run(space: Any) -> None:
        with pm.DeviceMemory(space.driver.device, 2 * PAGE, kind=kind) as vram:
            pm.migrate_to_device(space.mm, space.buf.addr, space.page(2), vram)

    return run


def _pin(space: Any) -> None:
    with pm.pin_user_pages(space.mm, space.page(1), 4) as pin:
        assert pin.read() == bytes(space.expected[PAGE : 5 * PAGE])


def _populate(space: Any) -> None:
    space.vram.populate(space.buf.addr, space.end())


def _untouched(space: Any) -> None:
    zap(space)
    zapped(space)
    there(space)


def _read_only(space: Any) -> None:
    space.mm.mprotect(space.buf.addr, PAGES * PAGE, mmap.PROT_READ)


def _read_only_there(space: Any) -> None:
    _read_only(space)
    there(space)


def _operations(delivery: str) -> list[Operation]:
    opens = partial(device_space, delivery)
    small = partial(device_space, delivery, pages=4)

    def op(name: str, *args: Any, opens: Any = opens, **how: Any) -> Operation:
        return Operation(f"{name}, {delivery}", *args, opens=opens, **how)

    return [
        op("migration to the device", _to_device, also=MOVES),
        op("migration of what is mapped", _to_device, map_all, also=MOVES),
        op("migration of read-only memory", _to_device, _read_only, also=MOVES),
        op("migration home of read-only memory", _to_system, _read_only_there, _none_there, also=MOVES),
        op("migration home", _to_system, there, _none_there, also=MOVES),
        op("a touch", _touch, there),
        op("a store", _store, there),
        op("a touch of what was never there", _touch, _untouched),
        op("device read of what is there", device_read, there, also=frozenset({errno.EBUSY})),
        op("device write to what is there", device_write, there, also=frozenset({errno.EBUSY})),
        op("munmap of what is there", unmap, there),
        op("mprotect of what is there", protect, there),
        op("madvise of what is there", zap, there, zapped),
        op("mremap of what is there", move, there),
        op("foreign madvise of what is there", foreign_zap, there),
        op("foreign munmap of what is there", foreign_unmap, there),
        op("foreign mremap of what is there", _foreign_move, there),
        op("fork of what is there", fork, there),
        op("eviction", _eviction, _four_pages, opens=small, also=MOVES),
        op("migration in steps", _in_steps, also=MOVES),
        op("eviction by pfn", _evict_by_pfn, there, _none_there, also=MOVES),
        op("pin of what is there", _pin, there, also=MOVES),
        op("population", _populate, _untouched),
        op("exclusive access", _exclusive, also=TAKES),
        op("exclusive access to a range", _exclusive_range, also=TAKES),
        op("an atomic", _atomic, also=TAKES),
        op("device memory", _memory("private"), also=MOVES),
    ]


COHERENT = partial(device_space, kind="coherent")


def _dma(run: Callable[[Any], object]) -> Callable[[Any], None]:
    def with_it(space: Any) -> None:
        run(space)
        assert space.driver.device.domain.stats()["mappings"] == 0

    return with_it


@contextmanager
def _range_mapped(space: Any, flags: int) -> Iterator[int]:
    """A range faulted and mapped for DMA: the address of its page 5."""
    device = space.driver.device
    with space.driver.range(space.buf.addr, space.page(PAGES)) as rng:
        rng.default_flags = flags
        rng.wait_until_valid()
        rng.fault()
        daddrs = pm.hmm_range_dma_map(rng, device)
        try:
            yield int(daddrs[5])
        finally:
            pm.hmm_range_dma_unmap(rng, device, dirty=flags == WRITE)


def _range_map(space: Any) -> None:
    with _range_mapped(space, FAULT) as daddr:
        assert space.driver.device.dma_read(daddr, PAGE) == bytes(space.expected[5 * PAGE : 6 * PAGE])


def _dma_write(space: Any) -> None:
    with _range_mapped(space, WRITE) as daddr:
        space.set(5, b"\6")
        space.driver.device.dma_write(daddr, bytes([6]) * PAGE)


def _pin_map(space: Any) -> None:
    device = space.driver.device
    with pm.pin_user_pages(space.mm, space.page(1), 4) as pin:
        daddrs = pm.gup_range_dma_map(pin, device)
        try:
            assert device.dma_read(int(daddrs[1]), PAGE) == bytes(space.expected[2 * PAGE : 3 * PAGE])
        finally:
            pm.gup_range_dma_unmap(pin, device)


def _dma_map(space: Any) -> None:
    device, start, end = space.driver.device, space.buf.addr, space.page(PAGES)
    sub = pm.IntervalNotifier(space.mm, start, end - start, lambda sub, update, seq: sub.set_seq(seq))
    try:
        args = pm.hmm_dma_map_alloc(device, sub, start, PAGES)
        try:
            seq = sub.read_begin()
            pm.hmm_range_fault(sub, start, end, args.pfn_list, default_flags=FAULT, seq=seq)
            daddrs = pm.hmm_dma_map_pfns(device, args, 0, PAGES, seq=seq)
            assert device.dma_read(int(daddrs[2]), 8) == bytes(space.expected[2 * PAGE : 2 * PAGE + 8])
        finally:
            pm.hmm_dma_unmap_pfns(device, args, 0, PAGES)
            pm.hmm_dma_map_free(device, args)
    finally:
        sub.remove()


def _single(space: Any) -> None:
    device, data = pm.Device("s"), bytes(space.expected[:PAGE])
    addr = pm.dma_map_single(device, data, PAGE, TO)
    if pm.dma_mapping_error(device, addr):
        raise pm.MirrorError(errno.ENOMEM, "DMA_MAPPING_ERROR")
    try:
        assert device.dma_read(addr, PAGE) == data
    finally:
        pm.dma_unmap_single(device, addr, PAGE, TO)
        device.release()


def _bounced(space: Any) -> None:
    """Beyond the mask: through swiotlb."""
    device = pm.Device("narrow", dma_mask=pm.DMA_BIT_MASK(32), iommu=False)
    data = bytes(space.expected[:PAGE])
    try:
        addr = pm.dma_map_single(device, data, PAGE, TO)
        if pm.dma_mapping_error(device, addr):
            raise pm.MirrorError(errno.ENOMEM, "DMA_MAPPING_ERROR")
        try:
            assert device.dma_read(addr, PAGE) == data
        finally:
            pm.dma_unmap_single(device, addr, PAGE, TO)
    finally:
        device.release()


def _dma_coherent(space: Any) -> None:
    device = pm.Device("c")
    cpu, addr = pm.dma_alloc_coherent(device, PAGE)
    try:
        device.dma_write(addr, b"device")
        assert bytes(cpu[:6]) == b"device"
    finally:
        pm.dma_free_coherent(device, PAGE, cpu, addr)
        device.release()


def _iova(space: Any) -> None:
    device = pm.Device("i")
    try:
        state = pm.dma_iova_try_alloc(device, PAGE, space.buf.addr)
        if state is None:
            raise pm.MirrorError(errno.ENOMEM, "no IOVA")
        try:
            pm.dma_iova_link(device, state, space.buf, 0, PAGE, TO)
            pm.dma_iova_sync(device, state, 0, PAGE)
            assert device.dma_read(state.addr, 8) == bytes(space.expected[:8])
            pm.dma_iova_unlink(device, state, 0, PAGE, TO)
        finally:
            pm.dma_iova_free(device, state)
    finally:
        device.release()


def _odp(space: Any) -> None:
    access = IB_ACCESS_ON_DEMAND | IB_ACCESS_LOCAL_WRITE | IB_ACCESS_REMOTE_READ
    with Odp(space.mm, timeout=10.0) as odp:
        mr = odp.reg_user_mr(space.buf.addr, space.buf.size, access)
        assert odp.read(mr.rkey, space.page(1), 3 * PAGE) == bytes(space.expected[PAGE : 4 * PAGE])
        odp.dereg_mr(mr)


def _userptr(space: Any) -> None:
    with Userptr(space.mm, timeout=10.0) as driver:
        bo = driver.gem_userptr(space.buf.addr, space.buf.size)
        same = bytes(space.expected[PAGE : PAGE + 4])
        assert driver.submit([Write(bo, PAGE, same), Read(bo, PAGE, 4)]) == [b"", same]


def _pinned(space: Any) -> None:
    with Pinned(space.mm, notified=True, timeout=10.0) as driver:
        assert driver.read(space.page(1), 3 * PAGE) == bytes(space.expected[PAGE : 4 * PAGE])
        driver.write(space.page(2), bytes(space.expected[2 * PAGE : 3 * PAGE]))


def _svm(space: Any) -> None:
    with Svm(space.mm, timeout=10.0, notifier_size=KiB64, chunk_sizes=(PAGE,)) as svm:
        found = svm.device.read(space.mm, space.page(1), 2 * PAGE)
        assert found == bytes(space.expected[PAGE : 3 * PAGE])


def _svm_memory(space: Any) -> None:
    with Svm(space.mm, vram=space.vram, timeout=10.0, notifier_size=KiB64, chunk_sizes=(PAGE,)) as svm:
        svm.bind(space.page(1), space.page(2))
        assert svm.device.read(space.mm, space.page(1), PAGE) == bytes(space.expected[PAGE : 2 * PAGE])


@contextmanager
def _dmirror(space: Any) -> Iterator[Dmirror]:
    mirror = Dmirror(space.mm, "hmm_dmirror0", quirks=Quirks())
    try:
        yield mirror
    finally:
        mirror.close()


def _dmirror_io(space: Any) -> None:
    with _dmirror(space) as mirror:
        assert bytes(mirror.read(space.buf.addr, 4).data) == bytes(space.expected[: 4 * PAGE])
        space.set(2, b"\5", 2)
        mirror.write(space.page(2), bytes([5]) * 2 * PAGE)


def _dmirror_migrate(space: Any) -> None:
    with _dmirror(space) as mirror:
        mirror.migrate_to_dev(space.buf.addr, 2)
        mirror.snapshot(space.buf.addr, 2)
        mirror.migrate_to_sys(space.buf.addr, 2)
        mirror.exclusive(space.page(2), 1)


def _simple(
    space: Callable[[], AbstractContextManager[Any]], **runs: Callable[[Any], object]
) -> list[Operation]:
    return [
        Operation(name.replace("_", " "), run, opens=space, also=TAKES | {errno.ENOENT})
        for name, run in runs.items()
    ]


def operations() -> list[Operation]:
    thread = partial(device_space)
    found = _operations("thread") + _operations("inline")
    found += [
        Operation("coherent migration", _to_device, opens=COHERENT, also=MOVES),
        Operation("coherent migration home", _to_system, there, _none_there, opens=COHERENT, also=MOVES),
        Operation("coherent munmap", unmap, there, opens=COHERENT),
        Operation("coherent madvise", zap, there, zapped, opens=COHERENT),
        Operation("coherent mremap", move, there, opens=COHERENT),
        Operation("coherent fork", fork, there, opens=COHERENT),
        Operation("coherent pin", _pin, there, opens=COHERENT, also=MOVES),
        Operation("coherent memory", _memory("coherent"), opens=thread, also=MOVES),
    ]
    found += _simple(
        thread,
        hmm_range_dma_map=_dma(_range_map),
        dma_write=_dma(_dma_write),
        gup_range_dma_map=_dma(_pin_map),
        hmm_dma_map=_dma(_dma_map),
        dma_map_single=_single,
        swiotlb=_bounced,
        dma_alloc_coherent=_dma_coherent,
        two_step_DMA=_iova,
        odp=_odp,
        userptr=_userptr,
        pinned=_pinned,
        svm=_svm,
        svm_with_device_memory=_svm_memory,
        dmirror=_dmirror_io,
        dmirror_migration=_dmirror_migrate,
    )
    return found


DEVICE_OPERATIONS = operations()
