"""The end of an address space: in what order, under whose hands, in a forked child, a thousand times."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from leaks import Holdings
from seams import Background, errno_of

import pymirror as pm
from pymirror.event import WHOLE_MM_END

PAGE = 4096


class Witness(pm.MmuNotifier):
    """Runs a function at release."""

    def __init__(self, mm: pm.AddressSpace, at_release: Callable[[], object]) -> None:
        self._at_release = at_release
        super().__init__(mm)

    def release(self) -> None:
        self._at_release()


def in_child(check: Callable[[], object]) -> None:
    """Run in a forked child, which must return normally and end as an interpreter does."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status == 0


def test_close_releases_notifiers_while_the_mm_still_works_then_ends_it() -> None:
    mm = pm.AddressSpace()
    seen: list[Any] = []

    def invalidate(sub: pm.IntervalNotifier, range: pm.MmuNotifierRange, seq: int) -> None:
        sub.set_seq(seq)
        seen.append((range.event.name, range.start, range.end))

    sub = pm.IntervalNotifier(mm, 0, WHOLE_MM_END, invalidate)
    Witness(mm, lambda: seen.append(("release", mm.closed, mm.stats()["active"])))
    mm.close()
    assert seen == [("RELEASE", 0, WHOLE_MM_END), ("release", False, 0)]
    assert mm.closed
    assert errno_of(sub.read_begin) == errno.ESRCH


def test_every_call_after_close_is_esrch() -> None:
    mm = pm.AddressSpace()
    region = mm.mmap(PAGE)
    mm.close()
    calls: list[Callable[[], object]] = [
        lambda: mm.mmap(PAGE),
        lambda: mm.munmap(region.addr, PAGE),
        lambda: mm.mprotect(region.addr, PAGE, 1),
        lambda: mm.madvise(region.addr, PAGE, 4),
        lambda: mm.mremap(region.addr, PAGE, PAGE),
        lambda: mm.read_lock().__enter__(),
        lambda: mm.invalidate(0, PAGE).__enter__(),
        lambda: mm.watch(region.addr, region.addr + PAGE),
        lambda: mm.find_vma(region.addr),
        lambda: next(mm.vmas()),
        mm.sync,
        lambda: pm.MmuNotifier(mm),
        lambda: pm.IntervalNotifier(mm, 0, PAGE, lambda *_: True),
    ]
    assert [errno_of(call) for call in calls] == [errno.ESRCH] * len(calls)
    mm.close()
    assert "closed" in mm.dump()
    assert mm.stats()["active"] == 0
    region.close()


def test_close_goes_on_when_callbacks_raise() -> None:
    mm = pm.AddressSpace()

    def fail() -> None:
        raise RuntimeError("the driver is broken")

    Witness(mm, fail)
    seen: list[int] = []
    Witness(mm, lambda: seen.append(1))
    mm.close()
    assert mm.closed
    assert seen == [1]
    assert [type(one.exception) for one in mm.errors] == [RuntimeError]


def test_ctrl_c_in_a_release_callback_comes_through_after_all_is_closed() -> None:
    mm = pm.AddressSpace()
    mm.mmap(PAGE)

    def interrupt() -> None:
        raise KeyboardInterrupt

    Witness(mm, interrupt)
    with pytest.raises(KeyboardInterrupt):
        mm.close()
    assert mm.closed


def test_close_inside_a_callback_is_edeadlk() -> None:
    found: list[int] = []
    with pm.AddressSpace() as mm:
        Witness(mm, lambda: found.append(errno_of(mm.close)))
    assert found == [errno.EDEADLK]


def test_close_under_a_driver_lock_is_edeadlk(mm: pm.AddressSpace) -> None:
    with pm.DriverLock():
        assert errno_of(mm.close) == errno.EDEADLK
    assert not mm.closed


def test_close_waits_for_readers_at_most_its_timeout(mm: pm.AddressSpace) -> None:
    entered, leave = threading.Event(), threading.Event()

    def read() -> None:
        with mm.read_lock():
            entered.set()
            leave.wait(10)

    reader = Background(read)
    entered.wait(10)
    with pytest.raises(pm.MirrorError, match=r"held by .*read") as failed:
        mm.close(timeout=0.05)
    assert failed.value.errno == errno.ETIMEDOUT
    assert not mm.closed
    closing = Background(mm.close)
    assert closing.stays()
    leave.set()
    reader.result()
    closing.result()
    assert mm.closed


def test_two_threads_may_close() -> None:
    mm = pm.AddressSpace()
    go = threading.Event()
    seen: list[int] = []
    Witness(mm, lambda: (seen.append(1), go.wait(5)))
    first = Background(mm.close)
    while not seen:
        time.sleep(0.001)
    second = Background(mm.close)
    assert second.stays()
    assert errno_of(mm.close, timeout=0.05) == errno.ETIMEDOUT
    go.set()
    first.result()
    second.result()
    assert seen == [1]


def test_operations_that_wait_for_the_lock_learn_of_the_close(mm: pm.AddressSpace) -> None:
    region = mm.mmap(PAGE)
    running, go = threading.Event(), threading.Event()

    class Slow(pm.MmuNotifier):
        def release(self) -> None:
            running.set()
            go.wait(10)

    Slow(mm)
    closing = Background(mm.close)
    running.wait(10)
    assert errno_of(mm.munmap, region.addr, PAGE) == errno.ESRCH
    go.set()
    closing.result()


def test_a_forked_child_is_told_and_left_alone() -> None:
    with pm.AddressSpace() as mm:
        region = mm.mmap(PAGE)
        region[0] = 7
        sub = pm.IntervalNotifier(mm, region.addr, PAGE, lambda sub, range, seq: sub.set_seq(seq))

        def check() -> None:
            calls: list[Callable[[], object]] = [
                lambda: mm.mmap(PAGE),
                lambda: mm.munmap(region.addr, PAGE),
                lambda: mm.mprotect(region.addr, PAGE, 1),
                lambda: mm.madvise(region.addr, PAGE, 4),
                lambda: mm.mremap(region.addr, PAGE, PAGE),
                lambda: mm.read_lock().__enter__(),
                lambda: mm.invalidate(0, PAGE).__enter__(),
                lambda: mm.find_vma(region.addr),
                mm.sync,
                mm.stats,
            ]
            assert [errno_of(call) for call in calls] == [errno.ESRCH] * len(calls)
            with pytest.raises(pm.MirrorError, match=f"belongs to process {mm.pid}; do: open a new"):
                mm.mmap(PAGE)
            mm.close()
            region.close()
            assert region[0] == 7
            assert "unusable" in mm.dump()
            with pm.AddressSpace() as own:
                assert own.mmap(PAGE)[0] == 0

        in_child(check)
        assert region[0] == 7
        mm.munmap(region.addr, PAGE)
        sub.remove()


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, timeout=30, check=False
    )


def test_the_exit_of_the_interpreter_closes_with_callbacks() -> None:
    done = run(
        "import pymirror as pm\n"
        "class N(pm.MmuNotifier):\n"
        "    def release(self): print('released', flush=True)\n"
        "mm = pm.AddressSpace(); n = N(mm); view = memoryview(mm.mmap(4096))\n"
        "sub = pm.IntervalNotifier(mm, 0, 1 << 64, lambda s, r, q: s.set_seq(q))\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "released\n", "")


def test_a_forked_child_exits_quietly() -> None:
    done = run(
        "import os, sys, pymirror as pm\n"
        "mm = pm.AddressSpace(); region = mm.mmap(4096, shared=True)\n"
        "sub = pm.IntervalNotifier(mm, region.addr, 4096, lambda s, r, q: s.set_seq(q))\n"
        "pid = os.fork()\n"
        "if pid == 0: sys.exit(3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])); mm.close()\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_one_that_is_collected_unclosed_warns_and_is_closed() -> None:
    mm = pm.AddressSpace()
    pm.MmuNotifier(mm)
    native = mm.native
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del mm
        gc.collect()
    assert [one.category for one in caught] == [ResourceWarning]
    assert pm.mm.lib.pm_mm_alive(native) == 0  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_thousand_cycles_leave_nothing() -> None:
    def cycle() -> None:
        with pm.AddressSpace() as mm:
            region = mm.mmap(64 * PAGE)
            shared = mm.mmap(PAGE, shared=True)
            sub = pm.IntervalNotifier(mm, region.addr, region.size, lambda sub, range, seq: sub.set_seq(seq))
            region[0] = shared[0] = 1
            mm.madvise(region.addr, PAGE, 4)
            mm.munmap(region.addr + 32 * PAGE, 16 * PAGE)
            assert not sub.read_retry(sub.read_begin())

    for _ in range(20):
        cycle()
    gc.collect()
    before, maps = Holdings.now(), count_maps()
    for _ in range(1000):
        cycle()
    gc.collect()
    assert Holdings.now().beyond(before) == []
    assert Holdings.now().memory - before.memory < 4 << 20
    assert abs(count_maps() - maps) <= 8


def count_maps() -> int:
    with open("/proc/self/maps") as maps:
        return sum(1 for _ in maps)


def test_many_at_once_in_many_threads() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                with pm.AddressSpace() as mm:
                    region = mm.mmap(4 * PAGE)
                    mm.munmap(region.addr, PAGE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
