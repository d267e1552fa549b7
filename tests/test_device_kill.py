# SPDX-License-Identifier: MIT
"""Ends of all kinds while pages are on a device: what should survive survives, and nothing hangs."""

from __future__ import annotations

import ctypes
import dis
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
import tally
from injecting import ERRORS
from mirroring import PAGE
from racing import in_child, wait_for
from seams import errno_of, inject

import pymirror as pm
from pymirror._shim import lib

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]

PAGES = 8
MOST_PLACES, MOST_CALLS = 2000, 80


def pattern() -> bytes:
    return (np.arange(PAGES * PAGE // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).tobytes()


class World:
    """Memory, half of it on a device, and a driver that is told."""

    def __init__(self, delivery: str) -> None:
        tally.add("interrupts, kills, failed calls on device memory", attempts=1)
        self.mm = pm.AddressSpace(fault_delivery=delivery)
        self.dev = pm.Device("d0")
        self.vram = pm.DeviceMemory(self.dev, 64 * PAGE)
        self.buf = self.mm.mmap(PAGES * PAGE)
        ctypes.memmove(self.buf.addr, pattern(), PAGES * PAGE)
        self.fail: Callable[[], None] = lambda: None
        self.sub = pm.IntervalNotifier(self.mm, self.buf.addr, self.buf.size, self._invalidate)
        pm.migrate_to_device(self.mm, self.buf.addr, self.page(PAGES // 2), self.vram)

    def _invalidate(self, sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
        sub.set_seq(seq)
        self.dev.page_table.clear(update.start, update.end)
        self.fail()
        return True

    def page(self, number: int) -> int:
        return self.buf.addr + number * PAGE

    def check(self) -> None:
        """The books are right, nothing is open, and every byte is there."""
        self.mm.sync()
        stats = self.mm.stats()
        assert (stats["active"], stats["inflight"], stats["drain_timeouts"]) == (0, 0, 0), self.mm.dump()
        held = int(np.count_nonzero(pm.exclusive_pfns(self.mm, self.buf.addr, self.page(PAGES))))
        resident = 0 if self.vram.closed else int(self.vram.holds(self.buf.addr, self.page(PAGES)).sum())
        assert (stats["device_resident"], self.vram.used) == (resident + held, resident * PAGE)
        assert ctypes.string_at(self.buf.addr, self.buf.size) == pattern()
        assert self.vram.used == 0

    def close(self) -> None:
        self.vram.close()
        self.sub.remove()
        self.mm.close()


Work = Callable[[World], object]


def fork(world: World) -> None:
    def child() -> None:
        lib.pm_inject_clear()
        intact = ctypes.string_at(world.buf.addr, world.buf.size) == pattern()
        assert intact

    assert in_child(child) == 0
    assert world.mm.stats()["device_child_lost"] == 0


def exclusive(world: World) -> None:
    with pm.make_device_exclusive_range(world.mm, world.buf.addr, world.page(PAGES), world.dev):
        pass


WORKS: dict[str, Work] = {
    "to the device": lambda w: pm.migrate_to_device(w.mm, w.buf.addr, w.page(PAGES), w.vram),
    "home": lambda w: pm.migrate_to_system(w.mm, w.buf.addr, w.page(PAGES), w.vram),
    "exclusive": exclusive,
    "close": lambda w: w.vram.close(),
}


@pytest.fixture(params=["thread", "inline"])
def delivery(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def world(delivery: str, nothing_left_behind: None) -> Iterator[World]:
    world = World(delivery)
    yield world
    world.close()


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("what", list(WORKS))
def test_an_exception_in_a_callback(world: World, what: str) -> None:
    def fail() -> None:
        raise BrokenError("the driver is broken")

    world.fail = fail
    WORKS[what](world)
    world.fail = lambda: None
    world.check()
    assert {type(one.exception) for one in world.mm.errors} == {BrokenError}


def test_an_exception_in_the_callback_of_a_touch(world: World) -> None:
    def fail() -> None:
        raise BrokenError("the driver is broken")

    world.fail = fail
    assert ctypes.string_at(world.buf.addr, 8) == pattern()[:8]
    world.mm.sync()
    world.fail = lambda: None
    world.check()
    assert {type(one.exception) for one in world.mm.errors} == {BrokenError}


@pytest.mark.parametrize("what", list(WORKS))
def test_ctrl_c_wherever_it_may_strike(delivery: str, what: str) -> None:
    """Wherever it strikes in Python, the call can be made again, and nothing is open or lost."""
    for nth in range(1, MOST_PLACES):
        world = World(delivery)
        struck = interrupted(lambda world=world: WORKS[what](world), nth)  # type: ignore[misc]
        WORKS[what](world)
        world.check()
        world.close()
        if not struck:
            assert nth > 10
            return
    raise AssertionError(f"{what} has more than {MOST_PLACES} places")


#: After these the interpreter looks whether a signal has come, and nowhere else.
LOOKS = {"CALL", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD", "CALL_KW"} & set(dis.opmap)

#: Finalizers and callbacks of weak references: Python itself loses what is raised there, gc aside.
LOST = {"<lambda>", "__del__", "_destroy"}


def interrupted(work: Callable[[], object], nth: int) -> bool:
    """Run it with a KeyboardInterrupt where Ctrl-C may strike in the library for the nth time."""
    left, last = nth, dict[int, str]()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if "/pymirror/" not in frame.f_code.co_filename or frame.f_code.co_name in LOST:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            before = last.get(id(frame), "RESUME")
            last[id(frame)] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            left -= before in LOOKS
            if left == 0 and before in LOOKS:
                raise KeyboardInterrupt
        elif event == "return":
            last.pop(id(frame), None)
        return trace

    before = sys.gettrace()
    gc.disable()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        gc.enable()
    return left <= 0


CALLS: dict[str, Work] = {
    **{name: WORKS[name] for name in ("to the device", "home", "exclusive")},
    "fork": fork,
}
REFUSALS = {errno.ENOMEM, errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENOSPC, errno.EFAULT}


@pytest.mark.parametrize("kind", ["IOCTL", "PREAD", "MMAP", "MADVISE", "MREMAP", "MALLOC", "READ", "POLL"])
@pytest.mark.parametrize("what", list(CALLS))
def test_one_system_call_that_fails(delivery: str, what: str, kind: str) -> None:
    """Whichever it is, of this thread or the monitor, every byte is there afterwards, in a child too."""
    for number in ERRORS[kind] + ([errno.EAGAIN] if kind == "IOCTL" else []):
        struck, nth = True, 0
        while struck and nth < MOST_CALLS:
            nth += 1
            world = World(delivery)
            with inject(kind, nth, number) as injection:
                code = errno_of(CALLS[what], world)
            struck = injection.struck > 0
            # Or what the kernel said is passed on, as of a vma that cannot be watched.
            assert code in REFUSALS | {0, number}, (
                f"{kind} {nth} {errno.errorcode[number]}: {errno.errorcode[code]}"
            )
            assert struck or not code
            world.check()
            CALLS[what](world)
            world.check()
            world.close()
            if kind in ("READ", "POLL") and nth > 4:
                break


def run(program: str, delivery: str) -> subprocess.CompletedProcess[str]:
    setup = (
        "import atexit, ctypes, os, signal, sys, threading, time\n"
        "import pymirror as pm\n"
        f"mm = pm.AddressSpace(fault_delivery={delivery!r})\n"
        "buf = mm.mmap(1 << 20)\n"
        "ctypes.memset(buf.addr, 7, buf.size)\n"
        "vram = pm.DeviceMemory(pm.Device('d'), 1 << 20)\n"
        "def leave(): return pm.migrate_to_device(mm, buf.addr, buf.addr + buf.size, vram)\n"
        "def look(): assert ctypes.string_at(buf.addr, buf.size) == b'\\7' * buf.size\n"
    )
    return subprocess.run(
        [sys.executable, "-c", setup + program], timeout=30, capture_output=True, text=True, check=False
    )


ENDINGS = {
    "atexit code that touches it": (
        "atexit.register(lambda: (look(), print('looked')))\nleave()\n",
        "looked\n",
    ),
    "atexit code that looks when all is closed": (
        "atexit.unregister(pm.mm._close_all)\n"
        "atexit.register(lambda: (look(), print('looked')))\n"
        "atexit.register(pm.mm._close_all)\nleave()\n",
        "looked\n",
    ),
    "a daemon thread that touches it all the while": (
        "def touch():\n    while True: look()\n"
        "threading.Thread(target=touch, daemon=True).start()\n"
        "for _ in range(20): leave()\n",
        "",
    ),
    "a thread that the interpreter waits for": (
        "def touch():\n    time.sleep(0.1); look(); print('looked')\n"
        "threading.Thread(target=touch).start()\nleave()\n",
        "looked\n",
    ),
    "os._exit": ("leave()\nos._exit(0)\n", ""),
    "exec": ("leave()\nos.execv('/bin/echo', ['echo', 'executed'])\n", "executed\n"),
}


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_the_end_of_the_process(delivery: str, ending: str) -> None:
    program, said = ENDINGS[ending]
    done = run(program, delivery)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


@pytest.mark.parametrize("ending", ["signal.SIGKILL", "signal.SIGTERM"])
def test_a_signal_that_kills(delivery: str, ending: str) -> None:
    done = run(f"leave()\nos.kill(os.getpid(), {ending})\ntime.sleep(30)\n", delivery)
    assert (done.returncode, done.stderr) == (-getattr(signal, ending.split(".")[1]), "")


def test_a_child_that_is_killed_with_pages_of_its_own_on_a_device(world: World) -> None:
    """And with those that it got from its parent, before the first touch of one."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        own = World(world.mm.fault_delivery)
        os.write(tell, b"x" if own.vram.used else b"-")
        signal.pause()
    assert os.read(ready, 1) == b"x"
    os.kill(pid, signal.SIGKILL)
    assert wait_for(pid) == signal.SIGKILL
    os.close(ready)
    os.close(tell)
    assert world.vram.used == PAGES // 2 * PAGE
    world.check()


def test_a_child_that_executes_another_program(world: World) -> None:
    assert subprocess.run(["/bin/true"], check=False).returncode == 0
    pid = os.fork()
    if pid == 0:
        os.execv("/bin/true", ["true"])
    assert wait_for(pid) == 0
    assert world.vram.used == PAGES // 2 * PAGE
    world.check()


def test_threads_that_touch_while_it_is_closed(delivery: str) -> None:
    for _ in range(10):
        world = World(delivery)
        wrong: list[int] = []
        go = threading.Barrier(3)

        def touch(world: World = world, wrong: list[int] = wrong, go: threading.Barrier = go) -> None:
            go.wait(10)
            for number in range(PAGES):
                at = number * PAGE
                if ctypes.string_at(world.page(number), PAGE) != pattern()[at : at + PAGE]:
                    wrong.append(number)

        threads = [threading.Thread(target=touch) for _ in range(2)]
        for thread in threads:
            thread.start()
        go.wait(10)
        world.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert not wrong
