"""What the threads of a run share, and the base of such a thread."""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

import pymirror as pm
from pymirror.demo.driver import DemoDriver
from pymirror.demo.memory import Chunk, Memory
from pymirror.demo.source import Bytes, generate

FAILURES_KEPT = 100


@dataclass(slots=True)
class World:
    """failures: sentences, one a thing that went wrong; any makes the run fail.
    running: cleared to end the threads."""

    mm: pm.AddressSpace
    device: pm.Device
    driver: DemoDriver
    memory: Memory
    pool: Bytes
    failures: list[str] = field(default_factory=list)
    running: bool = True

    def fail(self, what: str) -> None:
        if len(self.failures) < FAILURES_KEPT:
            self.failures.append(what)

    def fresh_data(self, rng: np.random.Generator, size: int) -> Bytes:
        """`size` bytes that are cheap to get and unlike what was there."""
        start = int(rng.integers(0, self.pool.size - size + 1))
        return self.pool[start : start + size]


def make_pool(seed: int, size: int) -> Bytes:
    """Noise for fresh_data: at least twice the largest piece asked of it."""
    rng = np.random.default_rng(seed)
    return generate(rng, size, turn=8)


class Worker(threading.Thread):
    """Runs `step` on chunks in random order while the world is running; counts by name in `tally`.

    A chunk that another thread has locked is passed over. An exception is a failure
    and ends the run; the chunk stays locked then, since it may be anything but memory.
    """

    def __init__(self, world: World, name: str, seed: Sequence[int], chunks: list[Chunk]) -> None:
        super().__init__(name=f"demo-{name}", daemon=True)
        self.world = world
        self.chunks = chunks
        self.rng = np.random.default_rng(seed)
        self.tally: Counter[str] = Counter()

    def step(self, chunk: Chunk) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            while self._going_on():
                for index in self.rng.permutation(len(self.chunks)):
                    if self._going_on():
                        self.visit(self.chunks[index])
        except BaseException as error:
            self.world.running = False
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.world.fail(
                f"{self.name}: {type(error).__name__}: {error} ({where.name}, line {where.lineno})"
            )

    def _going_on(self) -> bool:
        return self.world.running

    def pick(self, operations: Sequence[Operation], odds: list[float] | None = None) -> Operation:
        """One at random; of those that have not run yet, as long as there are any."""
        untried = [operation for operation in operations if operation.__name__ not in self.tally]
        if untried:
            return untried[int(self.rng.integers(len(untried)))]
        return operations[int(self.rng.choice(len(operations), p=odds))]

    def visit(self, chunk: Chunk) -> None:
        """Take a step on the chunk, if nobody else has it."""
        if chunk.lock.acquire(blocking=False):
            self.step(chunk)
            chunk.lock.release()


Operation = Callable[[Worker, Chunk], None]
