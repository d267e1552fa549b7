"""What watching costs the program that is watched, with no device active: the same program, unwatched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pymirror as pm
from benchmarks.floors import program
from benchmarks.memory import HUGE_PAGE, PAGE
from benchmarks.registry import Scale, Sides, benchmark


@contextmanager
def idle(work: str, size: int, done: int) -> Iterator[Sides]:
    with (
        program(work, size, watched=True, done=done) as ours,
        program(work, size, watched=False, done=done) as bare,
    ):
        yield Sides(ours, bare)


@benchmark("idle-touch", goal=1.03, unit="ms", rounds=41, setups=3)
@contextmanager
def idle_touch(scale: Scale) -> Iterator[Sides]:
    """First touch of 64 MiB of 4 KiB pages, watched; against unwatched."""
    size = scale.size(64 * pm.MiB)
    with idle("touch", size, size // PAGE) as sides:
        yield sides


@benchmark("idle-touch-huge", goal=1.03, unit="ms", rounds=41, setups=3)
@contextmanager
def idle_touch_huge(scale: Scale) -> Iterator[Sides]:
    """First touch of 64 MiB that come as huge pages, watched; against unwatched."""
    size = scale.size(64 * pm.MiB, multiple=HUGE_PAGE)
    with idle("touch-huge", size, size // HUGE_PAGE) as sides:
        yield sides


@benchmark("idle-sort", goal=1.03, unit="ms", rounds=41, setups=3)
@contextmanager
def idle_sort(scale: Scale) -> Iterator[Sides]:
    """numpy sort of 16 MiB of watched doubles; against unwatched."""
    size = scale.size(16 * pm.MiB)
    with idle("sort", size, size // 8 - 1) as sides:
        yield sides


@benchmark("idle-malloc", goal=1.02, unit="ms", rounds=41, setups=3)
@contextmanager
def idle_malloc(scale: Scale) -> Iterator[Sides]:
    """200 000 malloc and free beside 64 MiB of watched memory; against unwatched."""
    times = scale.count(200_000)
    with idle("malloc", times, times) as sides:
        yield sides
