# SPDX-License-Identifier: MIT
"""Threads that open, map, migrate, fault, fork and close at once, and compare every byte.

Each with its own address space, or all with one that is closed under them.

PYMIRROR_STRESS=N makes N times as many rounds, PYMIRROR_SEED=S the same choices.
"""

from __future__ import annotations

import ctypes
import errno
import random
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import tally
from mirroring import PAGE, FaultDriver, space_by
from racing import in_child
from seams import WAIT_S, Background, errno_of, foreign, needs
from test_stress import fine_switching, seeds

import pymirror as pm

KIND = "threads with address spaces"
THREADS, LIVES, CLOSES, PAGES = 4, 8, 6, 8
#: What calls give while others change the same memory, or close it.
REFUSED = {0, errno.EBUSY, errno.EAGAIN, errno.ENOSPC, errno.EFAULT}
pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]


class Piece:
    """Memory of one thread, and what is in it."""

    def __init__(self, mm: pm.AddressSpace, rng: random.Random) -> None:
        self.rng = rng
        self.region = mm.mmap(PAGES * PAGE)
        self.start, self.end = self.region.addr, self.region.addr + self.region.size
        self.data = bytearray(rng.randbytes(PAGES * PAGE))
        ctypes.memmove(self.start, bytes(self.data), len(self.data))

    def check(self) -> None:
        assert ctypes.string_at(self.start, len(self.data)) == self.data

    def store(self) -> None:
        at, piece = self.rng.randrange(len(self.data) - 8), self.rng.randbytes(8)
        ctypes.memmove(self.start + at, piece, 8)
        self.data[at : at + 8] = piece


def steps(
    piece: Piece, mm: pm.AddressSpace, vram: pm.DeviceMemory, driver: FaultDriver
) -> list[Callable[[], object]]:
    def device_write() -> None:
        # In one page: a refused write may have been made up to the next.
        at, data = piece.rng.randrange(len(piece.data) // 8) * 8, piece.rng.randbytes(8)
        driver.device.write(mm, piece.start + at, data)
        piece.data[at : at + 8] = data

    def device_read() -> None:
        assert driver.device.read(mm, piece.start, len(piece.data)) == piece.data

    def drop() -> None:
        page = piece.rng.randrange(PAGES)
        foreign.madvise(piece.start + page * PAGE, PAGE, 4)
        piece.data[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)

    def child() -> None:
        assert in_child(piece.check) == 0

    return [
        *[lambda: pm.migrate_to_device(mm, piece.start, piece.end, vram)] * 3,
        lambda: pm.migrate_to_system(mm, piece.start, piece.end),
        piece.store,
        piece.check,
        device_write,
        device_read,
        drop,
        child,
    ]


def live(seed: str, count: Counter[str]) -> None:
    """A whole life of an address space, which is closed with pages on its device."""
    rng = random.Random(seed)
    mm = space_by(rng.choice(("thread", "inline")))
    with FaultDriver(mm) as driver, pm.DeviceMemory(None, PAGES * PAGE) as vram:
        piece = Piece(mm, rng)
        choices = steps(piece, mm, vram, driver)
        for _ in range(12):
            rng.choice(choices)()
            count["operations"] += 1
        pm.migrate_to_device(mm, piece.start, piece.end, vram)
        (mm if rng.random() < 0.5 else vram).close()
        piece.check()
    mm.close()
    piece.check()
    count["spaces"] += 1


def test_each_thread_has_its_own() -> None:
    needs("uffd_kernel", "uffd_events", "sigbus", "event_fork", "pagemap")
    counts = [Counter[str]() for _ in range(THREADS)]

    def lives(seed: int, number: int) -> None:
        for life in range(LIVES):
            live(f"{seed} {number} {life}", counts[number])

    with tally.timed(KIND), fine_switching():
        for seed in seeds():
            print(f"PYMIRROR_SEED={seed}")
            threads = [Background(lives, seed, number) for number in range(THREADS)]
            for thread in threads:
                thread.result(6 * WAIT_S)
    total = sum(counts, Counter[str]())
    tally.add(KIND, threads=THREADS, **total)


@pytest.mark.parametrize("delivery", ["thread", "inline"])
def test_one_is_closed_under_all(delivery: str) -> None:
    """Calls are refused from some moment on, with ESRCH; what has been done until then is there."""
    needs("uffd_kernel", "uffd_events", "sigbus", "event_fork", "pagemap")
    with tally.timed(KIND), fine_switching():
        for seed in seeds():
            print(f"PYMIRROR_SEED={seed}")
            for closing in range(CLOSES):
                done = close_under(delivery, f"{seed} {closing}")
                tally.add(KIND, operations=done, spaces=1)


def close_under(delivery: str, seed: str) -> int:
    rng = random.Random(seed)
    mm = space_by(delivery)
    vram = pm.DeviceMemory(None, 3 * PAGES * PAGE)
    pieces = [Piece(mm, random.Random(f"{seed} {n}")) for n in range(THREADS)]
    drivers = [FaultDriver(mm) for _ in pieces]
    done, enough = [0] * THREADS, threading.Semaphore(0)

    def use(n: int) -> None:
        choices = steps(pieces[n], mm, vram, drivers[n])
        while (code := errno_of(pieces[n].rng.choice(choices))) != errno.ESRCH:
            assert code in REFUSED, errno.errorcode[code]
            done[n] += 1
            enough.release()

    users = [Background(use, n) for n in range(THREADS)]
    for _ in range(rng.randrange(4, 60)):
        assert enough.acquire(timeout=WAIT_S)
    mm.close()
    for user in users:
        user.result()
    for piece in pieces:
        piece.check()
    for driver in drivers:
        driver.unregister()
    vram.close()
    return sum(done)
