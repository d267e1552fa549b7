# SPDX-License-Identifier: MIT
"""Everything at once that moves memory: CPU threads, devices, migration, eviction, forks, changes of memory.

The threads of test_stress.py, whose memory goes to small device memories and comes back all the while. Every
byte is compared after every operation, and all of them at the end. PYMIRROR_STRESS=N does N times as much;
PYMIRROR_SEED=S repeats what each thread does.
"""

from __future__ import annotations

import ctypes
import random
import threading

import numpy as np
import pytest
from model import HUGE, PAGE
from seams import needs
from stress_devices import DeviceOwner, MixedMemory, Mover, readable
from stress_memory import Chunk
from test_exclusive import atomic_adder
from test_stress import HUGE_PAGES, OWNERS, STRESS, Stress, fine_switching, seeds

import pymirror as pm
from pymirror.replay.hugepages import overcommit

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]


class DeviceStress(Stress):
    kind = "threads on memory that moves"

    def __init__(self, seed: int, delivery: str, off: tuple[str, ...], cpu_add: object) -> None:
        self.memory_owner = object()
        self.cpu_add = cpu_add
        super().__init__(seed, delivery, off)
        self.counter = self.mm.mmap(PAGE)
        self.places = {chunk: threading.Lock() for chunk in self.memory.chunks}
        self.vrams = [
            pm.DeviceMemory(None, size, owner=self.memory_owner, fault_around=around)
            for size, around in ((HUGE + 64 * PAGE, PAGE), (24 * PAGE, 64 << 10))
        ]
        self.workers += [Mover(self, "mover"), Mover(self, "other mover")]

    def map_memory(self, rng: random.Random) -> MixedMemory:
        return MixedMemory(self.mm, rng, OWNERS)

    def owner(self, name: str, chunks: list[Chunk]) -> DeviceOwner:
        return DeviceOwner(self, name, chunks)

    def account(self) -> None:
        """What is on the devices is what their books say, and all of it comes home."""
        stats = self.mm.stats()
        places = [(one.addr, one.end) for one in self.memory.chunks]
        places.append((self.counter.addr, self.counter.addr + PAGE))
        held = sum(int(np.count_nonzero(pm.exclusive_pfns(self.mm, *place))) for place in places)
        for vram in self.vrams:
            assert vram.used // PAGE == sum(int(vram.holds(*place).sum()) for place in places)
        assert stats["device_resident"] == held + sum(vram.used // PAGE for vram in self.vrams)
        assert stats["device_child_lost"] == 0
        assert stats["device_faults"] > 0
        assert stats["device_to_device"] > 0
        for chunk in self.memory.chunks:
            readable(self.mm, chunk)
        self.compare()
        total = int.from_bytes(ctypes.string_at(self.counter.addr, 8), "little")
        assert total == sum(owner.counted for owner in self.owners)
        for vram in self.vrams:
            vram.close()
        assert self.mm.stats()["device_resident"] == 0
        self.compare()

    def close(self) -> None:
        for vram in self.vrams:
            vram.close()
        super().close()


@pytest.mark.hugetlb
@pytest.mark.parametrize(
    ("delivery", "off"),
    [("thread", ()), ("inline", ()), ("thread", ("move",))],
    ids=["thread", "inline", "without move"],
)
@pytest.mark.timeout(120 * STRESS)
def test_memory_that_moves_keeps_every_byte(delivery: str, off: tuple[str, ...]) -> None:
    needs("uffd_kernel", "move", "uffd_events", "pagemap")
    with overcommit(HUGE_PAGES), fine_switching(), atomic_adder(8) as cpu_add:
        for seed in seeds():
            print(f"PYMIRROR_SEED={seed}")
            stress = DeviceStress(seed, delivery, off, cpu_add)
            try:
                stress.run()
                stress.account()
            finally:
                stress.close()
