"""A program that works while its memory is watched, or is not: `python -m benchmarks.idle WORK SIZE 0|1`.

One round a line on stdin, as the floors do it. No device is active. The two differ in nothing but that one
has an address space, in which a mirror has a range over the memory.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter_ns

import numpy as np

import pymirror as pm
from benchmarks.floors import timed
from benchmarks.memory import HUGE_PAGE, MADV_NOHUGEPAGE, PAGE

Round = Callable[[], tuple[int, int]]
"""Gives nanoseconds, and how much was done."""


@contextmanager
def watch(mirror: pm.Mirror | None, memory: np.ndarray) -> Iterator[None]:
    if mirror is None:
        yield
        return
    with mirror.mm.adopt(memory) as region, mirror.range(region.addr, region.addr + region.size):
        yield


def untouched(size: int, advice: int) -> np.ndarray:
    """Of this size, on a 2 MiB boundary."""
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(advice)
    memory = np.frombuffer(mapped, np.uint8)
    first = -memory.ctypes.data % HUGE_PAGE
    return memory[first : first + size]


def huge_pages_at(addr: int) -> int:
    """How many the kernel has made in the mapping at addr."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            first, _, last = key.partition("-")
            inside = int(first, 16) <= addr < int(last, 16)
        elif inside and key == "AnonHugePages:":
            return int(rest.split()[0]) * 1024 // HUGE_PAGE
    return 0


def touch(mirror: pm.Mirror | None, size: int, advice: int) -> tuple[int, int]:
    memory = untouched(size, advice)
    addr = memory.ctypes.data
    with watch(mirror, memory):
        ns = timed().timed_writes(addr, size)
        done = huge_pages_at(addr) if advice == mmap.MADV_HUGEPAGE else int(memory[::PAGE].sum())
    return ns, done


@contextmanager
def sorting(mirror: pm.Mirror | None, size: int) -> Iterator[Round]:
    numbers = np.random.default_rng(1).random(size // 8)
    copy = numbers.copy()

    def one_round() -> tuple[int, int]:
        copy[:] = numbers
        start = perf_counter_ns()
        copy.sort()
        ns = perf_counter_ns() - start
        return ns, int((copy[1:] >= copy[:-1]).sum())

    with watch(mirror, copy):
        yield one_round


@contextmanager
def churning(mirror: pm.Mirror | None, times: int) -> Iterator[Round]:
    beside = np.ones(64 * pm.MiB, np.uint8)
    with watch(mirror, beside):
        yield lambda: (timed().timed_churn(times), times)


@contextmanager
def touching(mirror: pm.Mirror | None, size: int) -> Iterator[Round]:
    yield lambda: touch(mirror, size, MADV_NOHUGEPAGE)


@contextmanager
def touching_huge(mirror: pm.Mirror | None, size: int) -> Iterator[Round]:
    yield lambda: touch(mirror, size, mmap.MADV_HUGEPAGE)


WORKS = {"touch": touching, "touch-huge": touching_huge, "sort": sorting, "malloc": churning}


def main(work: str, size: str, watched: str) -> None:
    with ExitStack() as stack:
        mirror = (
            stack.enter_context(pm.Mirror(stack.enter_context(pm.AddressSpace()))) if int(watched) else None
        )
        one_round = stack.enter_context(WORKS[work](mirror, int(size)))
        for _ in sys.stdin:
            print(*one_round(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
