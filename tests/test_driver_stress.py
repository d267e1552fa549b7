"""All drivers at once over one address space, while its owners change it: nobody ever sees a stale byte.

Each thread knows every byte of a mapping of its own, changes it by the API or behind the library's back, and
compares what each driver's device reads. PYMIRROR_STRESS=N does N times as much; PYMIRROR_SEED=S repeats what
each thread does.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from dma import nothing_mapped
from mirroring import PAGE
from racing import NativeFork, replace
from seams import WAIT_S, foreign
from test_stress import fine_switching

import pymirror as pm
from pymirror.device_memory import NEEDS
from pymirror.drivers.odp import (
    IB_ACCESS_LOCAL_WRITE,
    IB_ACCESS_ON_DEMAND,
    IB_ACCESS_REMOTE_READ,
    IB_ACCESS_REMOTE_WRITE,
    U64_MAX,
    Odp,
    OdpMr,
)
from pymirror.drivers.pinned import Pinned
from pymirror.drivers.svm import Svm
from pymirror.drivers.userptr import Read, Userptr, UserptrBo, Write

STRESS = int(os.environ.get("PYMIRROR_STRESS", "1"))
SEED = os.environ.get("PYMIRROR_SEED")
OWNERS, OPERATIONS, PAGES = 3, 120, 24
RIGHTS = IB_ACCESS_ON_DEMAND | IB_ACCESS_LOCAL_WRITE | IB_ACCESS_REMOTE_READ | IB_ACCESS_REMOTE_WRITE
PATIENCE_S = 3 * WAIT_S

Reads = Callable[[int, int], bytes]
Writes = Callable[[int, bytes], object]


class Drivers:
    """One of each kind."""

    def __init__(self, mm: pm.AddressSpace) -> None:
        self.mm = mm
        self.stack = ExitStack()
        enter = self.stack.enter_context
        gpu = pm.Device("gpu", fault_timeout=PATIENCE_S)
        vram = None
        if all(name in mm.features for name in NEEDS[mm.fault_delivery]):
            vram = enter(pm.DeviceMemory(gpu, 2 * PAGES * PAGE))
        self.svm = enter(Svm(mm, device=gpu, vram=vram, chunk_sizes=(8 * PAGE, PAGE), timeout=PATIENCE_S))
        self.userptr = enter(Userptr(mm, timeout=PATIENCE_S))
        self.userptr.device.fault_timeout = PATIENCE_S
        self.odp = enter(Odp(mm, timeout=PATIENCE_S, imr_chunk=16 * PAGE))
        self.implicit = self.odp.reg_user_mr(0, U64_MAX, RIGHTS)
        self.pinned: Pinned | None = None
        if "io_uring" in mm.features:
            self.pinned = enter(Pinned(mm, notified=True, cache_size=PAGES * PAGE, timeout=PATIENCE_S))

    def close(self) -> None:
        self.stack.close()
        assert (self.svm.device.stats.stale, self.userptr.device.stats.stale) == (0, 0)
        assert nothing_mapped(self.odp.device)
        stats = self.mm.stats()
        assert (stats["pins"], stats["interval_notifiers"], stats["callback_errors"]) == (0, 0, 0)


class Owner(threading.Thread):
    """One mapping, its bytes, and accesses to it by each driver."""

    def __init__(self, drivers: Drivers, seed: str) -> None:
        super().__init__(daemon=True)
        self.drivers, self.mm = drivers, drivers.mm
        self.rng = random.Random(seed)
        self.size = PAGES * PAGE
        self.buf = self.mm.mmap(self.size)
        self.addr = self.buf.addr
        self.model = bytearray(self.size)
        self.readonly = False
        self.mr: OdpMr = drivers.odp.reg_user_mr(self.addr, self.size, RIGHTS)
        self.bo: UserptrBo = drivers.userptr.gem_userptr(self.addr, self.size)
        self.error: BaseException | None = None
        self.doing = ""

    def run(self) -> None:
        try:
            for _ in range(OPERATIONS * STRESS):
                change = self.rng.choice(self.CHANGES)
                self.doing = change.__name__
                change(self)
                self.compare()
        except BaseException as error:
            error.add_note(f"after {self.doing}")
            self.error = error

    def span(self) -> tuple[int, int]:
        at = self.rng.randrange(self.size)
        return at, min(self.rng.choice((1, 100, PAGE, 5 * PAGE)), self.size - at)

    def page(self) -> int:
        return self.rng.randrange(PAGES)

    def compare(self) -> None:
        at, n = self.span()
        for name, read in self.readers():
            self.doing += f", {name}"
            assert read(self.addr + at, n) == self.model[at : at + n], f"{name} sees something else"

    def readers(self) -> Iterator[tuple[str, Reads]]:
        drivers = self.drivers
        yield "the CPU", ctypes.string_at
        yield "svm", lambda addr, n: drivers.svm.device.read(self.mm, addr, n)
        yield "odp", lambda addr, n: drivers.odp.read(self.mr.rkey, addr, n)
        yield "implicit odp", lambda addr, n: drivers.odp.read(drivers.implicit.rkey, addr, n)
        if self.readonly:
            return
        yield "userptr", lambda addr, n: drivers.userptr.submit([Read(self.bo, addr - self.addr, n)])[0]
        if drivers.pinned is not None:
            yield "pinned", drivers.pinned.read

    def writers(self) -> list[Writes]:
        drivers = self.drivers
        found: list[Writes] = [
            lambda addr, data: ctypes.memmove(addr, data, len(data)),
            lambda addr, data: drivers.svm.device.write(self.mm, addr, data),
            lambda addr, data: drivers.odp.write(self.mr.rkey, addr, data),
            lambda addr, data: drivers.userptr.submit([Write(self.bo, addr - self.addr, data)]),
        ]
        return [*found, drivers.pinned.write] if drivers.pinned is not None else found

    def write(self) -> None:
        if self.readonly:
            return
        at, n = self.span()
        data = self.rng.randbytes(n)
        self.rng.choice(self.writers())(self.addr + at, data)
        self.model[at : at + n] = data

    def drop(self) -> None:
        page = self.page()
        (self.mm if self.rng.random() < 0.5 else foreign).madvise(
            self.addr + page * PAGE, PAGE, mmap.MADV_DONTNEED
        )
        self.dropped(page)

    def replace(self) -> None:
        if self.readonly:
            return
        page = self.page()
        self.mm.watch(self.addr, self.addr + self.size)
        replace(self.addr + page * PAGE)
        self.dropped(page)

    def dropped(self, page: int) -> None:
        self.model[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        # The pinning driver is told by a callback alone, and that comes after a foreign call.
        self.mm.sync(PATIENCE_S)

    def protect(self) -> None:
        self.readonly = not self.readonly
        prot = mmap.PROT_READ if self.readonly else mmap.PROT_READ | mmap.PROT_WRITE
        self.mm.mprotect(self.addr, self.size, prot)

    def bind(self) -> None:
        page = self.page()
        self.drivers.svm.bind(self.addr + page * PAGE, self.addr + (page + 1) * PAGE)

    def migrate_home(self) -> None:
        pm.migrate_to_system(self.mm, self.addr, self.addr + self.size)

    def add(self) -> None:
        """An atomic of the device, where it may have the memory to itself, which pinned pages are not."""
        if self.readonly or self.drivers.svm.vram is None:
            return
        at = self.rng.randrange(self.size // 8) * 8
        old = int.from_bytes(self.model[at : at + 8], "little")
        try:
            assert self.drivers.svm.device.atomic_add(self.mm, self.addr + at, 7) == old
        except pm.MirrorError as refused:
            if refused.errno != errno.EOPNOTSUPP:
                raise
            return
        self.model[at : at + 8] = ((old + 7) % (1 << 64)).to_bytes(8, "little")

    def fork(self) -> None:
        assert NativeFork().result(PATIENCE_S) == 0

    CHANGES = (write, write, write, drop, drop, replace, protect, bind, bind, add, add, migrate_home, fork)


@pytest.mark.parametrize("delivery", ["thread", "inline"])
@pytest.mark.timeout(100 + 40 * STRESS)
def test_no_driver_sees_a_stale_byte(delivery: str) -> None:
    seed = int(SEED) if SEED else 1 if "CI" in os.environ else random.SystemRandom().randrange(1 << 30)
    print(f"PYMIRROR_SEED={seed}")
    with fine_switching(), pm.AddressSpace(fault_delivery=delivery) as mm:
        drivers = Drivers(mm)
        try:
            owners = [Owner(drivers, f"{seed} {number}") for number in range(OWNERS)]
            for owner in owners:
                owner.start()
            for owner in owners:
                owner.join(PATIENCE_S * STRESS)
            stuck = [owner.doing for owner in owners if owner.is_alive()]
            assert not stuck, f"{stuck}\n{mm.dump()}"
            for owner in owners:
                if owner.error is not None:
                    raise owner.error
        finally:
            drivers.close()
