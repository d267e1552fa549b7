# SPDX-License-Identifier: MIT
"""The stress of device memory: what owners of memory do with it there, and who moves it about meanwhile."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from model import HUGE, PAGE, READ, WRITE
from model_device import Mapped
from seams import errno_of
from stress_memory import Chunk, Memory
from stress_workers import (
    OPERATIONS_BY_NAME,
    PATIENCE_S,
    Operations,
    OwnDriver,
    Owner,
    Worker,
    cpu_write,
    protect,
)

import pymirror as pm

if TYPE_CHECKING:
    from test_device_stress import DeviceStress

#: What a migration may be refused for while others unmap, fork and pin what it is about.
REFUSALS = (0, errno.EINVAL, errno.ENOSPC, errno.EBUSY, errno.EAGAIN)
#: What a device may have to itself: it moves by either delivery.
PRIVATE = ("anonymous", "thp", "raw")


class MixedMemory(Memory):
    """With a whole huge page for each owner, too."""

    def __init__(self, mm: pm.AddressSpace, rng: random.Random, owners: int) -> None:
        super().__init__(mm, rng, owners)
        for _ in range(owners):
            addr = mm.mmap(HUGE, huge="thp").addr
            self.chunks.append(Chunk("thp", addr, HUGE, -1, 0, bytearray(HUGE), bytes(HUGE)))


class PlaceDriver(OwnDriver):
    """Uses device memory where it is, and takes pages to itself for atomics."""

    def __init__(self, mm: pm.AddressSpace, log: Any, owner: object) -> None:
        super().__init__(mm, log)
        self.owner = owner
        self.device.fault_timeout = PATIENCE_S

    def look(self, sub: pm.IntervalNotifier, start: int, end: int, flags: int) -> tuple[int, Any]:
        pfns = np.zeros((end - start) // PAGE, np.uint64)
        seq = sub.read_begin(timeout=PATIENCE_S)
        pm.hmm_range_fault(sub, start, end, pfns, default_flags=flags, seq=seq, dev_private_owner=self.owner)
        # As the kernel's it gives own pages as they are, and a fork has made them read-only.
        readonly = pm.is_device_private_pfn(pfns) & ((pfns & np.uint64(pm.HMM_PFN_WRITE)) == 0)
        if flags & pm.HMM_PFN_REQ_WRITE and readonly.any():
            pm.migrate_to_system(self.mm, start, end)
            raise pm.MirrorError(errno.EAGAIN, "brought home to be written")
        return seq, pfns

    def serve(self, fault: pm.DeviceFault) -> None:
        if not fault.atomic:
            super().serve(fault)
            return
        self.again(lambda: self._take(fault.addr))

    def _take(self, addr: int) -> bool:
        sub = self.insert(addr, addr + PAGE)
        pm.make_device_exclusive(self.mm, addr, self.device)
        seq = sub.read_begin(timeout=PATIENCE_S)
        pfns = pm.exclusive_pfns(self.mm, addr, addr + PAGE)
        with self.lock:
            done = self.device.page_table.map(sub, seq, addr, pfns)
        if done:
            self.log.append(Mapped(self.device.page_table, addr, pfns, frozenset()))
        return bool(pfns[0]) and done


class DeviceOwner(Owner):
    """An owner of memory whose device may have it."""

    stress: DeviceStress
    count = 500
    counted = 0

    def open_driver(self) -> PlaceDriver:
        return PlaceDriver(self.mm, self.stress.log, self.stress.memory_owner)

    def operations(self) -> Operations:
        more: Operations = {
            "to_device": (12, to_device),
            "to_system": (4, to_system),
            "system_calls": (5, system_calls),
            "numpy_write": (4, numpy_write),
            "atomic": (4, atomic),
            "count": (4, count),
            "read_only_there": (3, read_only_there),
        }
        operations = {**OPERATIONS_BY_NAME, "populate": (2, populate), "move": (6, move), **more}
        for name in ("swap", "remap", "map_over", "move"):
            operations[name] = operations[name][0], in_its_place(operations[name][1])
        return operations


def in_its_place(operation: Callable[[DeviceOwner, Chunk], None]) -> Callable[[DeviceOwner, Chunk], None]:
    """What takes a chunk away from its addresses: another's memory may be there next, a stack for one."""

    def run(owner: DeviceOwner, chunk: Chunk) -> None:
        with owner.stress.places[chunk]:
            operation(owner, chunk)

    return run


def move(owner: DeviceOwner, chunk: Chunk) -> None:
    """What was partly on a device may be several vmas, which the kernel moves only one by one."""
    if chunk.kind == "hugetlb":
        return
    room = owner.mm.mmap(chunk.size, prot=0, huge="thp" if chunk.kind == "thp" else None)
    vmas = [
        (max(vma.start, chunk.addr), min(vma.end, chunk.end)) for vma in owner.mm.vmas(chunk.addr, chunk.end)
    ]
    code = errno_of(take, owner, room.addr, chunk.addr, chunk.end)
    assert code in (0, errno.EFAULT if len(vmas) > 1 else 0)
    for start, end in vmas if code else []:
        take(owner, room.addr + start - chunk.addr, start, end)
    chunk.addr = room.addr


def take(owner: DeviceOwner, place: int, start: int, end: int) -> None:
    flags = pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED
    owner.mm.mremap(start, end - start, end - start, flags=flags, new_addr=place)


def to_device(owner: DeviceOwner, chunk: Chunk) -> None:
    offset, size = owner.pages(chunk)
    vram = owner.rng.choice(owner.stress.vrams)
    code = errno_of(pm.migrate_to_device, owner.mm, chunk.addr + offset, chunk.addr + offset + size, vram)
    assert code in REFUSALS, errno.errorcode[code]


def to_system(owner: DeviceOwner, chunk: Chunk) -> None:
    pm.migrate_to_system(owner.mm, chunk.addr, chunk.end)


def system_calls(owner: DeviceOwner, chunk: Chunk) -> None:
    """write(2) from it and read(2) into it. With inline delivery they want what the CPU has touched."""
    if chunk.prot != WRITE or owner.mm.fault_delivery == "inline":
        return
    offset = owner.rng.randrange(0, chunk.size, PAGE)
    view = memoryview((ctypes.c_char * PAGE).from_address(chunk.addr + offset)).cast("B")
    read, write = os.pipe()
    try:
        assert os.write(write, view) == PAGE
        assert os.read(read, PAGE) == chunk.data[offset : offset + PAGE]
        data = owner.data(PAGE)
        os.write(write, data)
        assert os.readv(read, [view]) == PAGE
        chunk.wrote(offset, data)
    finally:
        os.close(read)
        os.close(write)


def numpy_write(owner: DeviceOwner, chunk: Chunk) -> None:
    """Many words at once, in a thread that holds the GIL."""
    if chunk.prot != WRITE:
        return
    there = np.frombuffer((ctypes.c_char * chunk.size).from_address(chunk.addr), np.uint64)
    step, value = owner.rng.choice((1, 3, 512)), np.uint64(owner.rng.randrange(1 << 60))
    for words in (there, np.frombuffer(chunk.data, np.uint64)):
        words[::step] += value


def atomic(owner: DeviceOwner, chunk: Chunk) -> None:
    """An atomic of the device on a word, which it has to have to itself for that."""
    if chunk.prot != WRITE or chunk.kind not in PRIVATE:
        return
    offset = owner.rng.randrange(0, chunk.size, 8)
    before = int.from_bytes(chunk.data[offset : offset + 8], "little")
    assert owner.own.device.atomic_add(owner.mm, chunk.addr + offset, 7) == before
    chunk.wrote(offset, ((before + 7) % (1 << 64)).to_bytes(8, "little"))


def count(owner: DeviceOwner, chunk: Chunk) -> None:
    """A word that all count in, by the CPU's atomics and by their devices'."""
    stress = owner.stress
    if owner.api():
        stress.cpu_add(stress.counter.addr, 1)
    else:
        owner.own.device.atomic_add(owner.mm, stress.counter.addr, 1)
    owner.counted += 1


def read_only_there(owner: DeviceOwner, chunk: Chunk) -> None:
    """It becomes read-only on the device, is read by both, and may be written again."""
    to_device(owner, chunk)
    protect(owner, chunk, READ)
    owner.compare(chunk)
    protect(owner, chunk, WRITE)
    cpu_write(owner, chunk)


def populate(owner: DeviceOwner, chunk: Chunk) -> None:
    """By the API: the kernel's own call is refused for what is on a device with inline delivery."""
    advice = owner.rng.choice((22, 23))
    code = errno_of(owner.mm.madvise, chunk.addr, chunk.size, advice)
    needed = READ if advice == 22 else WRITE
    assert code == (0 if chunk.prot & needed == needed else errno.EINVAL)


class Mover(Worker):
    """Moves anybody's memory, there and back, while its owner uses it and changes it where it is."""

    stress: DeviceStress

    def work(self) -> None:
        while any(owner.is_alive() for owner in self.stress.owners):
            chunk = self.rng.choice(self.stress.memory.chunks)
            vram = self.rng.choice(self.stress.vrams)
            with self.stress.places[chunk]:
                first = self.rng.randrange(chunk.size // PAGE)
                start = chunk.addr + first * PAGE
                end = start + self.rng.randint(1, chunk.size // PAGE - first) * PAGE
                self.doing = f"move [{start:#x}, {end:#x}) of {chunk}"
                move = pm.migrate_to_device if self.rng.random() < 0.7 else pm.migrate_to_system
                code = errno_of(move, self.mm, start, end, vram)
                assert code in REFUSALS, errno.errorcode[code]
            self.tally["moved"] += 1


def readable(mm: pm.AddressSpace, chunk: Chunk) -> None:
    if not chunk.prot & READ:
        mm.mprotect(chunk.addr, chunk.size, mmap.PROT_READ)
        chunk.prot = READ
