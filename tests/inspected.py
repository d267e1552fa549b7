"""A process to be inspected: `python inspected.py MODE` brings itself into a state, says so, and stays there.

It prints `ready`, then what the mode has to tell, one line, and goes on until it is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

from seams import foreign, points

import pymirror as pm

PAGE = 4096
PAGES = 8
NOHUGEPAGE = 15
_libc = ctypes.CDLL(None, use_errno=True)


class Driver(pm.Mirror):
    def __init__(self, mm: pm.AddressSpace, stuck: threading.Event | None = None) -> None:
        self.dev = pm.Device("d0")
        self.stuck = stuck
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        if self.stuck is not None:
            self.stuck.wait()
        self.dev.page_table.clear(update.start, update.end)


def mirror(mm: pm.AddressSpace, stuck: threading.Event | None = None) -> tuple[Driver, pm.Region]:
    """Eight small pages, the first three written, two more read, on a device."""
    region = mm.mmap(PAGES * PAGE)
    mm.madvise(region.addr, region.size, NOHUGEPAGE)
    for page in range(3):
        region[page * PAGE] = 1
    for page in (3, 4):
        region[page * PAGE]
    driver = Driver(mm, stuck)
    rng = driver.range(region.addr, region.addr + 3 * PAGE)
    rng.register()
    rng.default_flags = pm.HMM_PFN_REQ_FAULT
    rng.wait_until_valid(timeout=5)
    seq = rng.fault()
    with driver.lock:
        assert driver.dev.page_table.map(rng, seq)
    driver.kept = rng  # type: ignore[attr-defined]
    return driver, region


def say(*words: object) -> None:
    print("ready", *words, flush=True)


def stay() -> None:
    signal.pause()


def background(fn: Callable[..., Any], *args: Any) -> int:
    """The tid of a thread that makes this call."""
    started: list[int] = []
    known = threading.Event()

    def run() -> None:
        started.append(threading.get_native_id())
        known.set()
        fn(*args)

    threading.Thread(target=run, daemon=True, name="worker").start()
    known.wait()
    return started[0]


def healthy() -> None:
    with pm.AddressSpace() as mm:
        _kept = mirror(mm)
        say()
        stay()


def two() -> None:
    with pm.AddressSpace(), pm.AddressSpace():
        say()
        stay()


def closed() -> None:
    pm.AddressSpace().close()
    say()
    stay()


def event_callback() -> None:
    with pm.AddressSpace() as mm:
        _driver, region = mirror(mm, threading.Event())
        foreign.munmap(region.addr, PAGE)
        say()
        stay()


def api_callback() -> None:
    with pm.AddressSpace() as mm:
        _driver, region = mirror(mm, threading.Event())
        say(background(mm.munmap, region.addr, PAGE))
        stay()


def operation() -> None:
    def change(mm: pm.AddressSpace, region: pm.Region) -> None:
        with mm.invalidate(region.addr, region.addr + PAGE):
            stay_in_thread()

    with pm.AddressSpace() as mm:
        _driver, region = mirror(mm)
        say(background(change, mm, region))
        stay()


def stay_in_thread() -> None:
    threading.Event().wait()


def gil() -> None:
    with pm.AddressSpace() as mm:
        _kept = mirror(mm)
        say()
        ctypes.PyDLL(None).pause()


def lock() -> None:
    with pm.AddressSpace() as mm:
        _driver, region = mirror(mm)
        with points("MONITOR_BEFORE_READ") as point:
            tid = background(foreign.munmap, region.addr, PAGE)
            point.wait()
            say(tid)
            stay()


def access() -> None:
    with pm.AddressSpace() as mm:
        driver, region = mirror(mm)
        with points("ACCESS_LOOKED_UP") as point:
            tid = background(driver.dev.read, mm, region.addr, 1)
            point.wait()
            say(tid)
            stay()


def mmap_lock() -> None:
    """A reader that stays, and an operation that waits for it."""

    def read(mm: pm.AddressSpace) -> None:
        with mm.read_lock():
            reading.set()
            stay_in_thread()

    reading = threading.Event()
    with pm.AddressSpace() as mm:
        reader = background(read, mm)
        reading.wait()
        say(reader, background(mm.mmap, PAGE))
        stay()


def driver_lock() -> None:
    """A driver that holds its lock for ever, and a callback that waits for it."""

    class Locking(Driver):
        def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
            with self.lock:
                pass

    def hold(driver: pm.Mirror) -> None:
        with driver.lock:
            holding.set()
            stay_in_thread()

    holding = threading.Event()
    with pm.AddressSpace() as mm:
        region = mm.mmap(PAGE)
        driver = Locking(mm)
        rng = driver.range(region.addr, region.addr + PAGE)
        rng.register()
        holder = background(hold, driver)
        holding.wait()
        say(holder, background(mm.munmap, region.addr, PAGE))
        stay()


def pinned() -> None:
    with pm.AddressSpace() as mm:
        region = mm.mmap(PAGES * PAGE)
        _kept = pm.pin_user_pages(mm, region.addr, PAGES, pm.FOLL_WRITE | pm.FOLL_LONGTERM)
        say()
        stay()


def fault() -> None:
    """A page fault that another userfaultfd of the process leaves unserved."""
    with pm.AddressSpace() as mm:
        _kept = mirror(mm)
        fd = _libc.syscall(323, os.O_CLOEXEC | 1)
        assert fd >= 0
        addr = foreign.mmap(0, PAGE)
        api = ctypes.create_string_buffer(struct.pack("=QQQ", 0xAA, 0, 0))
        register = ctypes.create_string_buffer(struct.pack("=QQQQ", addr, PAGE, 1, 0))
        assert _libc.ioctl(fd, ctypes.c_ulong(0xC018AA3F), api) == 0
        assert _libc.ioctl(fd, ctypes.c_ulong(0xC020AA00), register) == 0
        say(background(_libc.memset, ctypes.c_void_p(addr), 1, 1), fd)
        stay()


def clone() -> None:
    """The child of a raw clone has the status page of its parent still."""
    with pm.AddressSpace():
        child = _libc.syscall(56, signal.SIGCHLD, 0, 0, 0, 0)
        if child == 0:
            _libc.prctl(1, signal.SIGKILL)
            while True:
                _libc.pause()
        say(child)
        stay()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
