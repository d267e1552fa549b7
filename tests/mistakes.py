"""Mistakes of each common kind, made through the public API, for the test of what is said of them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from calls import World
from mirroring import FAULT, PAGE, WRITE
from notifying import interval

import pymirror as pm

#: What a message names: an address and its vma, an address in none, one of the two, an address alone (of an
#: object that is used wrongly, whatever is mapped there), or no address: options, locks, what is closed.
VMA, HOLE, PLACE, ADDRESS, NOTHING = "vma", "hole", "vma or hole", "address", "nothing"

HOLE_AT = 0x1000
USER_END = 1 << 47


@dataclass(frozen=True)
class Mistake:
    name: str
    number: int
    names: str
    make: Callable[[World], object]


MISTAKES: list[Mistake] = []


def _add(number: int, names: str, **how: Callable[[World], object]) -> None:
    MISTAKES.extend(Mistake(name, number, names, make) for name, make in how.items())


def _enter(manager: Any) -> None:
    with manager:
        pass


def _pfns(npages: int = 4) -> Any:
    return np.zeros(npages, np.uint64)


def _modern(w: World, start: int, end: int, pfns: Any) -> None:
    pm.hmm_range_fault(w.sub, start, end, pfns, default_flags=FAULT, seq=w.sub_seq)


def _fault(w: World, flags: int = FAULT) -> None:
    w.rng.wait_until_valid()
    w.rng.default_flags = flags
    w.rng.fault()


def _while_invalidated(w: World, call: Callable[[], object]) -> None:
    with w.mm.invalidate(w.start, w.end):
        call()


def _in_a_callback(w: World, call: Callable[[], object]) -> None:
    caught: list[BaseException] = []

    def take(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> None:
        sub.set_seq(seq)
        try:
            call()
        except pm.MirrorError as refused:
            caught.append(refused)

    sub = interval(w.mm, w.held.addr, 1, take)
    _enter(w.mm.invalidate(w.held.addr, w.held.addr + PAGE))
    sub.remove()
    raise caught[0]


def _refused_by_a_callback(w: World, call: Callable[[], object]) -> None:
    sub = interval(w.mm, w.start, 1, lambda sub, range, seq: False)
    try:
        call()
    finally:
        sub.remove()


def _breaks_a_rule(w: World, take: Callable[..., object]) -> None:
    sub = interval(w.mm, w.held.addr, 1, take)
    _enter(w.mm.invalidate(w.held.addr, w.held.addr + PAGE))
    sub.remove()
    raise w.mm.errors.pop().exception


@contextmanager
def _another_reads(w: World) -> Iterator[None]:
    reads, over = threading.Event(), threading.Event()

    def read() -> None:
        with w.mm.read_lock():
            reads.set()
            over.wait()

    thread = threading.Thread(target=read, name="reader")
    thread.start()
    reads.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _close_while_read(w: World) -> None:
    with _another_reads(w):
        w.mm.close(timeout=0.01)


def _map_file(w: World, flags: int, prot: int, shared: bool) -> pm.Region:
    fd = os.open(__file__, flags)
    try:
        return w.mm.mmap(PAGE, fd=fd, prot=prot, shared=shared)
    finally:
        os.close(fd)


def _make_writable(w: World) -> None:
    with _map_file(w, os.O_RDONLY, 1, True) as region:
        w.mm.mprotect(region.addr, PAGE, 3)


def _under(lock: Any, call: Callable[[], object]) -> None:
    with lock:
        call()


def _unserved(w: World) -> None:
    w.table.clear(0, USER_END)
    w.device.set_fault_handler(lambda fault: None)
    w.device.fault_timeout = 0.01
    w.device.read(w.mm, w.start, 8)


def _of_another_mm(w: World) -> None:
    with pm.AddressSpace() as other:
        w.device.read(other, other.mmap(PAGE).addr, 8)


def _dma_entry(w: World, then: Callable[[], object]) -> None:
    _modern(w, w.start, w.end, w.dma_map.pfn_list)
    pm.hmm_dma_map_pfn(w.device, w.dma_map, 0, seq=w.sub_seq)
    try:
        then()
    finally:
        pm.hmm_dma_unmap_pfn(w.device, w.dma_map, 0)


def _unpin_mapped(w: World) -> None:
    pm.gup_range_dma_map(w.pin, w.device)
    try:
        pm.unpin_user_pages(w.pin)
    finally:
        pm.gup_range_dma_unmap(w.pin, w.device)


def _tiny() -> pm.Device:
    return pm.Device("tiny", iommu=pm.IommuDomain(first=0x1000, last=0x2FFF))


_add(
    errno.EINVAL,
    VMA,
    range_not_aligned=lambda w: w.driver.range(w.start + 1, w.end),
    range_empty=lambda w: w.driver.range(w.start, w.start),
    range_reversed=lambda w: w.driver.range(w.end - PAGE, w.start),
    invalidate_not_aligned=lambda w: _enter(w.mm.invalidate(w.start + 1, w.end)),
    watch_not_aligned=lambda w: w.mm.watch(w.start, w.end + 1),
    munmap_not_aligned=lambda w: w.mm.munmap(w.start + 1, PAGE),
    munmap_empty=lambda w: w.mm.munmap(w.start, 0),
    mprotect_of_no_prot=lambda w: w.mm.mprotect(w.start, PAGE, 0x100),
    madvise_unknown=lambda w: w.mm.madvise(w.start, PAGE, 999),
    mremap_fixed_without_maymove=lambda w: w.mm.mremap(w.start, PAGE, PAGE, flags=2),
    mremap_onto_itself=lambda w: w.mm.mremap(w.start, 2 * PAGE, PAGE, flags=3, new_addr=w.start + PAGE),
    oom_reap_reversed=lambda w: w.mm.oom_reap(w.start + PAGE, w.start),
    adopt_too_small=lambda w: w.mm.adopt(np.zeros(16)),
    entries_not_aligned=lambda w: w.table.entries(w.start + 1, w.end),
    read_of_less_than_nothing=lambda w: w.device.read(w.mm, w.start, -1),
    dma_unmap_reversed=lambda w: pm.hmm_range_dma_unmap(w.rng, w.device, start=w.end, end=w.start),
    dma_unmap_not_aligned=lambda w: pm.hmm_range_dma_unmap(w.rng, w.device, start=w.start + 1, end=w.end),
    pin_of_nothing=lambda w: pm.pin_user_pages(w.mm, w.start, 0),
)
_add(
    errno.EINVAL,
    PLACE,
    modern_fault_outside_the_notifier=lambda w: _modern(w, w.start, w.end + PAGE, _pfns(5)),
    map_outside_the_notifier=lambda w: w.table.map(w.sub, w.sub_seq, w.start - PAGE, _pfns()),
)
_add(
    errno.EINVAL,
    HOLE,
    read_beyond_the_address_space=lambda w: w.device.read(w.mm, USER_END, 8),
    read_of_a_negative_address=lambda w: w.device.read(w.mm, -1, 8),
    write_beyond_64_bits=lambda w: w.device.write(w.mm, 1 << 64, b"x"),
)
_add(
    errno.EINVAL,
    ADDRESS,
    fault_unregistered=lambda w: w.unregistered.fault(),
    wait_unregistered=lambda w: w.unregistered.wait_until_valid(),
    map_unregistered=lambda w: w.table.map(w.unregistered, 1),
    map_without_pages=lambda w: w.table.map(w.sub, w.sub_seq),
    set_seq_outside=lambda w: w.sub.set_seq(1),
    no_callback=lambda w: pm.IntervalNotifier(w.mm, w.start, PAGE),
    half_a_two_pass_pair=lambda w: pm.IntervalNotifier(w.mm, w.start, PAGE, invalidate_start=print),
    no_set_seq=lambda w: _breaks_a_rule(w, lambda sub, range, seq: True),
    clear_below_0=lambda w: w.table.clear(-PAGE, PAGE),
    read_beyond_a_pin=lambda w: w.pin.read(0, 3 * PAGE),
    unpin_twice=lambda w: (pm.unpin_user_pages(w.pin), pm.unpin_user_pages(w.pin)),
    dma_entry_of_another_size=lambda w: pm.hmm_dma_map_alloc(w.device, w.sub, w.start, 2, 8192),
    dma_entry_beyond=lambda w: pm.hmm_dma_map_pfn(w.device, w.dma_map, 9, seq=w.sub_seq),
    dma_map_of_another_device=lambda w: pm.hmm_dma_map_pfn(_tiny(), w.dma_map, 0, seq=w.sub_seq),
)
_add(
    errno.EINVAL,
    NOTHING,
    dma_read_of_less_than_nothing=lambda w: w.device.dma_read(0x5000, -1),
    dma_at_a_mapping_error=lambda w: w.device.dma_write(pm.DMA_MAPPING_ERROR, b"x"),
    iommu_by_number=lambda w: pm.Device("d", iommu=1),  # type: ignore[arg-type]
    pool_by_size=lambda w: pm.Device("d", swiotlb=1 << 20),  # type: ignore[arg-type]
    map_pins_as_a_mirror=lambda w: pm.hmm_range_dma_map(w.pin, w.device),  # type: ignore[arg-type]
    unmap_pins_as_a_mirror=lambda w: pm.hmm_range_dma_unmap(w.pin, w.device),  # type: ignore[arg-type]
    map_a_device_for_a_range=lambda w: pm.hmm_range_dma_map(w.device, w.rng),  # type: ignore[arg-type]
    gup_map_of_an_mm=lambda w: pm.gup_range_dma_map(w.mm, w.device),  # type: ignore[arg-type]
    gup_unmap_for_an_mm=lambda w: pm.gup_range_dma_unmap(w.pin, w.mm),  # type: ignore[arg-type]
    scatterlist_of_buffers=lambda w: pm.dma_map_sg(w.device, [bytearray(8)], 1, 1),  # type: ignore[list-item]
    unknown_feature=lambda w: pm.AddressSpace(disable=["pfns"]),
    queue_of_0=lambda w: pm.AddressSpace(queue_length=0),
    unknown_delivery=lambda w: pm.AddressSpace(fault_delivery="later"),
    unknown_event=lambda w: _enter(w.mm.invalidate(w.start, w.end, 99)),  # type: ignore[arg-type]
    mmap_of_0=lambda w: w.mm.mmap(0),
    mmap_at_an_odd_offset=lambda w: w.mm.mmap(PAGE, fd=0, offset=5),
    mmap_of_unknown_pages=lambda w: w.mm.mmap(PAGE, huge="big"),
    page_shift_13=lambda w: w.driver.range(w.start, w.end, 13),
    half_an_encoding=lambda w: w.driver.range(w.start, w.end, flags=(1, 2, 4)),
    flags_that_overlap=lambda w: w.driver.range(
        w.start, w.end, flags=(1, 1, 4), values=(8, 0, 16), pfn_shift=12
    ),
    pfns_of_another_size=lambda w: _modern(w, w.start, w.end, _pfns(3)),
    pfns_that_are_a_list=lambda w: _modern(w, w.start, w.end, [0] * 4),
    adopt_without_a_buffer=lambda w: w.mm.adopt([1]),  # type: ignore[arg-type]
    adopt_with_gaps=lambda w: w.mm.adopt(np.zeros(4 * PAGE)[::2]),
    dma_mask_with_gaps=lambda w: pm.Device("d", dma_mask=5),
    dma_of_nothing=lambda w: w.device.dma_read(w.daddr, 0),
    dma_segments_too_short=lambda w: w.device.dma_write_sg([(w.daddr, 1)], b"12"),
    foreign_dma_addresses=lambda w: pm.hmm_range_dma_unmap(w.rng, w.device, _pfns() + np.uint64(0x9000)),
    pin_for_the_kernel=lambda w: pm.pin_user_pages(w.mm, w.held.addr, 1, pm.FOLL_GET),
    aperture_reversed=lambda w: pm.IommuDomain(first=5, last=4),
    reserve_reversed=lambda w: w.domain.reserve(0x5000, 0x4000),
    mm_down_read_unregistered=lambda w: (w.driver.unregister(), _enter(w.driver.mm_down_read())),
)
_add(errno.EOVERFLOW, ADDRESS, notifier_of_nothing=lambda w: interval(w.mm, w.start, 0))
_add(
    errno.EFAULT,
    HOLE,
    fault_of_a_hole=lambda w: (w.mm.munmap(w.start, PAGE), _fault(w)),
    read_of_a_hole=lambda w: w.device.read(w.mm, HOLE_AT, 8),
    mremap_of_a_hole=lambda w: w.mm.mremap(HOLE_AT, PAGE, PAGE),
    pin_of_a_hole=lambda w: pm.pin_user_pages(w.mm, HOLE_AT, 1),
    no_handler=lambda w: (w.device.set_fault_handler(None), w.device.read(w.mm, HOLE_AT, 8)),
)
_add(
    errno.EFAULT,
    VMA,
    fault_without_access=lambda w: (w.mm.mprotect(w.start, PAGE, 0), _fault(w)),
    stale_access=lambda w: (w.mm.madvise(w.start, PAGE, 4), w.device.read(w.mm, w.start, 8)),
    stale_dma=lambda w: (w.mm.madvise(w.start, PAGE, 4), w.device.dma_read(w.daddr, 8)),
    pin_read_only=lambda w: (w.mm.mprotect(w.held.addr, PAGE, 1), pm.pin_user_pages(w.mm, w.held.addr, 1)),
    no_iovas=lambda w: pm.hmm_range_dma_map(w.rng, _tiny()),
)
_add(
    errno.EFAULT,
    NOTHING,
    dma_unmapped=lambda w: w.device.dma_read(0x5000, 8),
    mirror_of_a_closed_mm=lambda w: (w.mm.close(), pm.Mirror(w.mm)),
    fault_in_a_closed_mm=lambda w: (w.mm.close(), w.rng.fault()),
    unregistered_mirror=lambda w: (w.driver.unregister(), w.driver.range(w.start, w.end).register()),
)
_add(
    errno.EPERM,
    VMA,
    write_to_read_only=lambda w: (w.mm.mprotect(w.start, PAGE, 1), _fault(w, WRITE)),
    snapshot_without_access=lambda w: (
        w.mm.mprotect(w.start, PAGE, 0),
        w.rng.wait_until_valid(),
        w.rng.snapshot(),
    ),
)
_add(errno.EPERM, NOTHING, release_of_a_free_lock=lambda w: w.lock.release())
_add(
    errno.EAGAIN,
    VMA,
    fault_of_an_invalid_range=lambda w: (w.mm.madvise(w.start, PAGE, 4), w.rng.fault()),
    callback_that_would_wait=lambda w: _refused_by_a_callback(
        w, lambda: _enter(w.mm.invalidate(w.start, w.end, blockable=False))
    ),
    reaping_that_would_wait=lambda w: _refused_by_a_callback(w, lambda: w.mm.oom_reap(w.start, w.end)),
)
_add(errno.EAGAIN, ADDRESS, refusal_of_a_blockable=lambda w: _breaks_a_rule(w, lambda sub, range, seq: False))
_add(
    errno.EBUSY,
    VMA,
    modern_fault_with_an_old_sequence=lambda w: (
        w.mm.madvise(w.start, PAGE, 4),
        _modern(w, w.start, w.end, _pfns()),
    ),
    vma_fault_meanwhile=lambda w: _while_invalidated(w, lambda: pm.hmm_vma_fault(w.rng)),
    dma_entry_invalidated=lambda w: _dma_entry(
        w,
        lambda: (
            _enter(w.mm.invalidate(w.start, w.end)),
            pm.hmm_dma_map_pfn(w.device, w.dma_map, 0, seq=w.sub_seq),
        ),
    ),
    munmap_of_adopted_memory=lambda w: w.mm.munmap(w.own.addr, PAGE),
)
_add(
    errno.EBUSY,
    ADDRESS,
    unpin_what_is_mapped=_unpin_mapped,
    free_what_is_mapped=lambda w: _dma_entry(w, lambda: pm.hmm_dma_map_free(w.device, w.dma_map)),
)
_add(errno.EBUSY, NOTHING, reserve_what_is_used=lambda w: w.domain.reserve(w.daddr, w.daddr + PAGE - 1))
_add(
    errno.ETIMEDOUT,
    VMA,
    wait_too_long=lambda w: _while_invalidated(w, lambda: w.rng.wait_until_valid(0.01)),
    read_begin_too_long=lambda w: _while_invalidated(w, lambda: w.sub.read_begin(0.01)),
    fault_not_served=_unserved,
)
_add(errno.ETIMEDOUT, NOTHING, close_while_read=_close_while_read)
_add(
    errno.EDEADLK,
    NOTHING,
    munmap_in_a_callback=lambda w: _in_a_callback(w, lambda: w.mm.munmap(w.start, PAGE)),
    fault_in_a_callback=lambda w: _in_a_callback(w, w.rng.fault),
    munmap_under_the_driver_lock=lambda w: _under(w.lock, lambda: w.mm.munmap(w.start, PAGE)),
    lock_twice=lambda w: _under(w.lock, w.lock.acquire),
    munmap_under_read_lock=lambda w: _under(w.mm.read_lock(), lambda: w.mm.munmap(w.start, PAGE)),
)
_add(errno.ENOMEM, HOLE, mprotect_over_a_hole=lambda w: w.mm.mprotect(HOLE_AT, PAGE, 1))
_add(errno.ENOMEM, VMA, mremap_without_room=lambda w: w.mm.mremap(w.start, 4 * PAGE, 1 << 40, flags=0))
_add(
    errno.ENOMEM,
    NOTHING,
    mmap_of_too_much=lambda w: w.mm.mmap(1 << 50),
    coherent_memory_of_too_much=lambda w: pm.dma_alloc_coherent(w.device, 1 << 50),
    coherent_memory_beyond_64_bits=lambda w: pm.dma_alloc_coherent(w.device, 1 << 64),
)
_add(errno.EACCES, NOTHING, map_shared_what_is_open_read_only=lambda w: _map_file(w, os.O_RDONLY, 3, True))
_add(errno.EACCES, VMA, write_to_what_is_open_read_only=lambda w: _make_writable(w))
_add(errno.EBADF, NOTHING, map_a_closed_descriptor=lambda w: w.mm.mmap(PAGE, fd=1 << 20))
_add(errno.ENOSPC, ADDRESS, no_iovas_for_entries=lambda w: pm.hmm_dma_map_alloc(_tiny(), w.sub, w.start, 4))
_add(
    errno.ESRCH,
    NOTHING,
    munmap_in_a_closed_mm=lambda w: (w.mm.close(), w.mm.munmap(w.start, PAGE)),
    notifier_of_a_closed_mm=lambda w: (w.mm.close(), interval(w.mm, w.start)),
    read_from_a_closed_mm=lambda w: (w.mm.close(), w.device.read(w.mm, w.start, 8)),
    pin_of_a_closed_mm=lambda w: (w.mm.close(), w.pin.read(0, 8)),
)
_add(errno.ESRCH, ADDRESS, read_begin_in_a_closed_mm=lambda w: (w.mm.close(), w.sub.read_begin()))
_add(errno.EXDEV, ADDRESS, device_of_another_mm=_of_another_mm)
_add(
    errno.EOPNOTSUPP,
    NOTHING,
    pin_for_a_short_time=lambda w: pm.pin_user_pages(w.mm, w.held.addr, 1, pm.FOLL_WRITE),
    mirror_through_a_bounce_buffer=lambda w: pm.hmm_range_dma_map(
        w.rng, pm.Device("d", iommu=False, dma_mask=0xFFFFFF)
    ),
)
