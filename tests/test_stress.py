"""Threads at once on one address space, one mirror and one device table, each with chunks of its own.

A thread knows every byte of its chunks; their neighbours in a mapping are others'. PYMIRROR_STRESS=N makes N
rounds. PYMIRROR_SEED=S repeats one, as far as threads can be repeated: what each of them does follows from
the seed, when it does it does not.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tally
from model import READ
from model_checks import quiet
from model_device import Log, Recorder
from stress_memory import Chunk, Memory
from stress_workers import PATIENCE_S, Onlooker, Owner, Scratch, Scribe, SharedDriver, Worker

import pymirror as pm
from pymirror.replay.hugepages import overcommit

STRESS = int(os.environ.get("PYMIRROR_STRESS", "1"))
SEED = os.environ.get("PYMIRROR_SEED")
OWNERS = 4
HUGE_PAGES = 64


class Stress:
    kind = "threads on one address space"

    def __init__(self, seed: int, delivery: str = "thread", off: tuple[str, ...] = ()) -> None:
        self.seed = seed
        self.stop = False
        self.log: Log = []
        self.mm = pm.AddressSpace(fault_delivery=delivery, disable=off)
        self.mirror = SharedDriver(self.mm, self.log)
        Recorder(self.mm, self.log)
        self.memory = self.map_memory(random.Random(f"{seed} memory"))
        self.owners = [self.owner(f"owner {i}", self.memory.chunks[i::OWNERS]) for i in range(OWNERS)]
        self.scratch = Scratch(self.mm, self.log)
        self.workers: list[Worker] = [*self.owners, Onlooker(self, "onlooker"), Scribe(self, "scribe")]

    def map_memory(self, rng: random.Random) -> Memory:
        return Memory(self.mm, rng, OWNERS)

    def owner(self, name: str, chunks: list[Chunk]) -> Owner:
        return Owner(self, name, chunks)

    def run(self) -> None:
        with tally.timed(self.kind):
            self._run()
        operations = sum(worker.tally.total() for worker in self.workers)
        tally.add(self.kind, operations=operations)

    def _run(self) -> None:
        for worker in self.workers:
            worker.start()
        until = time.monotonic() + 2 * PATIENCE_S
        for worker in self.workers:
            worker.join(max(0.0, until - time.monotonic()))
        for worker in self.workers:
            if worker.error is not None:
                raise worker.error
        stuck = [f"{worker.name}: {worker.doing}" for worker in self.workers if worker.is_alive()]
        assert not stuck, f"{stuck}\n{self.mm.dump()}"

    def compare(self) -> None:
        """Every byte, by the CPU and by each device, and the books, now that it is quiet."""
        self.mm.sync()
        for chunk in self.memory.chunks:
            if chunk.prot & READ:
                chunk.compare(ctypes.string_at(chunk.addr, chunk.size), "the CPU")
                for driver in (self.mirror, self.owners[0].own):
                    chunk.compare(driver.device.read(self.mm, chunk.addr, chunk.size), driver.device.name)
        stats = quiet(self.mm)
        assert (stats["callback_errors"], stats["drain_timeouts"]) == (0, 0), list(self.mm.errors)
        assert stats["subs"] == sum(len(owner.own.subs) for owner in self.owners)
        for driver in (self.mirror, self.scratch.driver, *(owner.own for owner in self.owners)):
            assert driver.device.stats.stale == 0
            assert driver.device.page_table.stats()["fenced"] == 0

    def close(self) -> None:
        self.scratch.unmap()
        self.memory.close()
        self.mm.close(PATIENCE_S)


@contextmanager
def fine_switching() -> Iterator[None]:
    """Threads change places often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(20e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def seeds() -> list[int]:
    if SEED is not None:
        return [int(SEED)]
    first = 1 if "CI" in os.environ else random.SystemRandom().randrange(1 << 30)
    return [first + i for i in range(STRESS)]


@pytest.mark.timeout(90 * STRESS)
def test_threads_keep_every_byte() -> None:
    with overcommit(HUGE_PAGES), fine_switching():
        for seed in seeds():
            print(f"PYMIRROR_SEED={seed}")
            stress = Stress(seed)
            try:
                stress.run()
                stress.compare()
            finally:
                stress.close()
