# SPDX-License-Identifier: MIT
"""Signals, thousands a second, to threads that migrate, fault, allocate, fork and close.

Their handler touches memory that goes to a device.

What handlers count must be all there at the end, in memory that has been on a device and back all the while.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tally
from conductor import handled, storm, touching
from mirroring import DELIVERIES, PAGE, FaultDriver, filled, space_by
from racing import LIBC, in_child
from seams import WAIT_S, Background, needs

import pymirror as pm

KIND = "handlers that touch device memory"
STRESS = int(os.environ.get("PYMIRROR_STRESS", "1"))
PAGES, ROUNDS = 8, 12 * STRESS
GAP_S = 0.0003
pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]


class Scene:
    """Memory that handlers read, and a word in which they count; it all goes to a device again and again."""

    def __init__(self, delivery: str) -> None:
        self.delivery = delivery
        self.mm = space_by(delivery)
        self.vram = pm.DeviceMemory(None, 64 * PAGE)
        self.buf = filled(self.mm, PAGES)
        self.word = self.mm.mmap(PAGE)
        self.content = bytes(self.buf)
        self.driver = FaultDriver(self.mm)
        self.mine = filled(self.mm, 2)

    def pages(self) -> list[int]:
        return [self.buf.addr + n * PAGE for n in range(PAGES)]

    def migrate(self) -> None:
        for region in (self.word, self.buf):
            pm.migrate_to_device(self.mm, region.addr, region.addr + region.size, self.vram)

    def fault(self) -> None:
        self.migrate()
        assert ctypes.string_at(self.buf.addr, self.buf.size) == self.content

    def use(self) -> None:
        """A device reads what handlers read, and writes from there."""
        self.migrate()
        device = self.driver.device
        assert device.read(self.mm, self.buf.addr, self.buf.size) == self.content
        view = np.frombuffer(self.buf, np.uint8)
        device.write(self.mm, self.mine.addr, view[: 2 * PAGE])
        assert bytes(self.mine) == self.content[: 2 * PAGE]

    def allocate(self) -> None:
        self.migrate()
        for size in (24, 1000, 70_000, 300_000) * 8:
            LIBC.free(ctypes.c_void_p(LIBC.malloc(size)))

    def fork(self) -> None:
        self.migrate()

        def child() -> None:
            assert ctypes.string_at(self.buf.addr, self.buf.size) == self.content

        assert in_child(child) == 0

    def close_another(self) -> None:
        """Its pages come home in the end, while handlers want those of this one."""
        with space_by(self.delivery) as other, pm.DeviceMemory(None, 4 * PAGE) as vram:
            buf = filled(other, 4)
            content = bytes(buf)
            assert pm.migrate_to_device(other, buf.addr, buf.addr + buf.size, vram) == 4
            self.migrate()
        assert bytes(buf) == content

    def close(self) -> None:
        self.vram.close()
        self.driver.unregister()
        self.mm.close()


@pytest.fixture(params=DELIVERIES)
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    needs("uffd_kernel", "uffd_events", "sigbus", "event_fork", "pagemap")
    LIBC.malloc.restype = ctypes.c_void_p
    made = Scene(request.param)
    yield made
    made.close()


def rounds(work: Callable[[], None]) -> None:
    with storm(GAP_S):
        for _ in range(ROUNDS):
            work()


@pytest.mark.timeout(90, method="thread")
@pytest.mark.parametrize("who", ["the main thread", "two threads"])
def test_nothing_is_lost_and_nobody_waits_for_ever(scene: Scene, who: str) -> None:
    works = [scene.fault, scene.use, scene.allocate, scene.fork, scene.close_another]
    with tally.timed(KIND), touching(scene.pages(), scene.word.addr):
        if who == "the main thread":
            for work in works:
                rounds(work)
        else:
            # Each of them moves what the other's handlers touch.
            others = (
                Background(lambda: [rounds(work) for work in reversed(works)]),
                Background(rounds, scene.fault),
            )
            for other in others:
                other.result(6 * WAIT_S)
        counted = int.from_bytes(ctypes.string_at(scene.word.addr, 8), "little")
        assert counted == handled() > 0
    assert bytes(scene.buf) == scene.content
    stats = scene.mm.stats()
    assert (stats["device_child_lost"], stats["drain_timeouts"]) == (0, 0)
    tally.add(KIND, operations=ROUNDS * len(works), signals=counted)
