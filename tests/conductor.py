# SPDX-License-Identifier: MIT
"""At every named point that a call meets: a signal whose handler touches memory, or a fork (conductor.c)."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mirroring import PAGE
from seams import points

from pymirror._shim import ffi, lib

SIGNAL = 40  # none of Python's, nor of libc's
POINTS = {
    name.removeprefix("PM_POINT_"): number
    for number, name in ffi.typeof("enum pm_point").elements.items()
    if name != "PM_POINT_COUNT"
}
#: Threads of the library come here, and not the one that has made a call.
OTHERS = {name for name in POINTS if name.startswith("MONITOR_") or name == "REMOVE_LINGER"}
#: Of a fork.
FORKS = {name for name in POINTS if name.startswith("FORK_")}


@cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "conductor.so"
        source = Path(__file__).with_name("conductor.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-pthread", "-o", built, source], check=True)
        found = ctypes.CDLL(str(built))
    found.touch_ran.restype = ctypes.c_uint64
    found.conductor_start.restype = ctypes.c_void_p
    return found


def numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * len(values))(*values)


def address(function: str) -> ctypes.c_void_p:
    return ctypes.c_void_p(int(ffi.cast("uintptr_t", ffi.addressof(lib, function))))


@dataclass
class Fork:
    """A child made while a thread stood at a point, and what it read; the last page may be unmapped."""

    point: str
    status: int
    pages: list[bytes]


@dataclass
class Met:
    points: list[str] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    handled: int = 0


@contextmanager
def touching(pages: Sequence[int], counter: int = 0) -> Iterator[None]:
    """The handler of SIGNAL reads these pages, and counts in the word at ``counter``."""
    library().touch(
        (ctypes.c_uint64 * len(pages))(*pages), ctypes.c_uint64(len(pages)), ctypes.c_uint64(counter)
    )
    library().touch_at(SIGNAL, 0)
    try:
        yield
    finally:
        library().touch_at(SIGNAL, 1)


@contextmanager
def storm(gap_s: float) -> Iterator[None]:
    """SIGNAL to this thread as often as that."""
    timer = ctypes.c_int()
    gap = ctypes.c_uint64(int(gap_s * 1e9))
    assert library().storm_start(threading.get_native_id(), SIGNAL, gap, ctypes.byref(timer)) == 0
    try:
        yield
    finally:
        library().storm_stop(timer)


def handled() -> int:
    """How often the handler has run."""
    return int(library().touch_ran())


@contextmanager
def conducted(
    names: Sequence[str], pages: Sequence[int], counter: int = 0, *, forks: bool = False
) -> Iterator[Met]:
    """Of the block, in this thread. What it met is known at its end."""
    met = Met()
    room = mmap.mmap(-1, len(names) * len(pages) * PAGE)
    there = (ctypes.c_char * len(room)).from_buffer(room)
    tid = threading.get_native_id()
    with touching(pages, counter), points(*names):
        conductor = ctypes.c_void_p(
            library().conductor_start(
                address("pm_point_wait"),
                address("pm_point_release"),
                numbers([POINTS[name] for name in names]),
                numbers([name in OTHERS for name in names]),
                len(names),
                tid,
                0 if forks else SIGNAL,
                there,
            )
        )
        try:
            yield met
        finally:
            library().conductor_stop(conductor)
            met.points = [name for i, name in enumerate(names) if library().conductor_met(conductor, i)]
            met.forks = list(_forks(conductor, there, len(pages)))
            met.handled = handled()
            library().conductor_free(conductor)
            del there
            room.close()


def _forks(conductor: ctypes.c_void_p, room: ctypes.Array[ctypes.c_char], pages: int) -> Iterator[Fork]:
    by_number = {number: name for name, number in POINTS.items()}
    status, i = ctypes.c_int(), 0
    while (point := library().conductor_fork(conductor, i, ctypes.byref(status))) >= 0:
        found = room[i * pages * PAGE : (i + 1) * pages * PAGE]
        yield Fork(
            by_number[point], status.value, [found[at : at + PAGE] for at in range(0, len(found), PAGE)]
        )
        i += 1
