"""Every system call of every operation fails once: the error is clean, nothing is lost, left or broken by it.

The n-th call of one kind fails, for n from 1 until the operation gets by without meeting it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from functools import partial

import pytest
import tally
from injecting import (
    ERRORS,
    HUGE,
    OPERATIONS,
    Operation,
    Space,
    apart,
    check_all_is_well,
    device_read,
    device_write,
    fault,
    foreign_unmap,
    foreign_zap,
    gone,
    map_all,
    space,
    unfaulted,
)
from injecting_device import DEVICE_OPERATIONS
from mirroring import PAGE, FaultDriver, filled
from racing import MAP_FIXED_NOREPLACE, raw_clone, wait_for
from seams import Background, errno_of, foreign, inject, needs

import pymirror as pm
from pymirror._shim import lib

KIND = "fault injection, by operation"
MOST = 200


def attempt(operation: Operation, kind: str, number: int, nth: int) -> bool:
    """One failure of the n-th call; False when there was none."""
    what = f"{kind} {nth} {errno.errorcode[number]}"
    with operation.opens() as made:
        operation.prepare(made)
        before = bytes(made.expected)
        with inject(kind, nth, number) as injection:
            refusal = refusal_of(operation.run, made)
        name = errno.errorcode.get(refusal, refusal)
        assert refusal in {0, number} | operation.also, f"{what} gave {name}"
        if refusal:
            assert injection.struck, f"{what}: {name} of itself"
            made.expected[:] = before
            check_all_is_well(made)
            operation.run(made)
        operation.done(made)
        check_all_is_well(made)
        return bool(injection.struck)


def refusal_of(run: Callable[..., object], *args: object) -> int:
    """0 or the errno of an error of the library; any other comes through."""
    try:
        run(*args)
    except pm.MirrorError as error:
        return error.errno or -1
    return 0


def kinds_used(operation: Operation) -> list[str]:
    """The kinds of calls that it makes. The monitor's own are among them, at all times."""
    with operation.opens() as made:
        operation.prepare(made)
        before = {kind: lib.pm_sys_calls(getattr(lib, f"PM_SYS_{kind}")) for kind in ERRORS}
        operation.run(made)
        return [
            kind for kind, n in before.items() if lib.pm_sys_calls(getattr(lib, f"PM_SYS_{kind}")) > n
        ] + ["READ", "POLL"]


def number_of_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def features() -> None:
    needs("uffd_events", "pagemap", "event_fork")


def fail_each_call(operation: Operation) -> None:
    fds = number_of_fds()
    tally.add(KIND, operations=1)
    with tally.timed(KIND):
        for kind in dict.fromkeys(kinds_used(operation)):
            nth = 1
            while True:
                tried = [
                    apart(kind, partial(attempt, operation, kind, number, nth))
                    for number in operation.errors_at(kind, nth)
                ]
                tally.add(KIND, faults_injected=sum(tried))
                if not any(tried):
                    break
                nth += 1
                assert nth < MOST
    assert number_of_fds() == fds


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_one_call_that_fails(operation: Operation) -> None:
    fail_each_call(operation)


@pytest.mark.root
@pytest.mark.parametrize("operation", DEVICE_OPERATIONS, ids=lambda operation: operation.name)
def test_one_call_that_fails_with_device_memory(operation: Operation) -> None:
    fail_each_call(operation)


def test_another_thread_takes_the_place_of_what_was_unmapped() -> None:
    """That is no error: it may happen to each operation that unmaps."""
    with space() as made:
        map_all(made)
        foreign_unmap(made)
        assert foreign.mmap(made.page(2), PAGE, flags=MAP_FIXED_NOREPLACE) == made.page(2)
        gone(made)
        check_all_is_well(made)
        foreign.munmap(made.page(2), PAGE)


def test_open() -> None:
    fds = number_of_fds()
    pm.AddressSpace().close()
    refused = 0
    for kind, numbers in ERRORS.items():
        for number in numbers:
            struck, nth = True, 0
            while struck:
                nth += 1
                with inject(kind, nth, number) as injection:
                    opened: list[pm.AddressSpace] = []
                    refusal = refusal_of(lambda opened=opened: opened.append(pm.AddressSpace()))  # type: ignore[misc]
                struck = injection.struck > 0
                assert refusal in (0, number), f"{kind} {nth}"
                refused += refusal != 0
                assert bool(opened) == (refusal == 0)
                for mm in opened:
                    with FaultDriver(mm) as driver:
                        buf = filled(mm, 2)
                        assert driver.device.read(mm, buf.addr, buf.size) == bytes(buf)
                    mm.close()
                assert number_of_fds() == fds
    assert refused


@pytest.mark.parametrize("kind", ["CLOSE", "IOCTL", "WRITE", "READ", "POLL", "PREAD"])
def test_close(kind: str) -> None:
    """It ends whatever fails, and nobody waits for events afterwards."""
    fds = number_of_fds()
    for number in ERRORS[kind]:
        struck, nth = True, 0
        while struck and nth < MOST:
            nth += 1
            mm = pm.AddressSpace()
            driver = FaultDriver(mm)
            buf = filled(mm, 4)
            before = bytes(buf)
            driver.map(buf.addr, buf.addr + buf.size)
            with inject(kind, nth, number) as injection:
                mm.close()
            struck = injection.struck > 0
            assert mm.closed
            Background(foreign.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED).result()
            assert bytes(buf) == bytes(PAGE) + before[PAGE:]
            assert number_of_fds() == fds


@pytest.mark.parametrize("kind", ["READ", "POLL"])
def test_the_monitor_bears_with_many_failures(kind: str) -> None:
    for number in ERRORS[kind]:
        with space() as made:
            map_all(made)
            with inject(kind, 1, number, times=50) as injection:
                foreign_zap(made)
                assert wait_for(raw_clone()) == 0
            assert injection.struck
            check_all_is_well(made)


@pytest.mark.parametrize(
    ("prepare", "run", "kind", "number", "refusal"),
    [
        (map_all, device_read, "PREAD", errno.EINTR, errno.EINTR),
        (map_all, device_write, "PREAD", errno.EINTR, errno.EINTR),
        (unfaulted, fault, "PREAD", errno.EINTR, errno.EINTR),
        (unfaulted, fault, "MADVISE", errno.EAGAIN, errno.EBUSY),
        (unfaulted, fault, "MADVISE", errno.EINTR, errno.EBUSY),
        (unfaulted, fault, "MADVISE", errno.ENOMEM, errno.ENOMEM),
    ],
)
def test_a_call_that_keeps_failing(
    prepare: Callable[[Space], None], run: Callable[[Space], None], kind: str, number: int, refusal: int
) -> None:
    """No loop goes on for ever, and none is left with half of its work."""
    with space() as made:
        prepare(made)
        with inject(kind, 1, number, times=1 << 40, tid=threading.get_native_id()):
            assert refusal_of(run, made) == refusal
        check_all_is_well(made)
        run(made)
        check_all_is_well(made)


def test_a_reservation_that_cannot_be_cut(mm: pm.AddressSpace) -> None:
    """For huge pages more is reserved than asked for: were the rest not given back it would be lost."""

    def reserved() -> int:
        return sum(vma.size for vma in mm.vmas() if vma.prot == 0 and not vma.file)

    mm.mmap(PAGE)
    before, nth, struck = reserved(), 0, True
    while struck:
        nth += 1
        with inject("MUNMAP", nth, errno.ENOMEM) as injection:
            refusal = errno_of(mm.mmap, 64 * HUGE, huge="thp")
        struck = injection.struck > 0
        assert refusal == (errno.ENOMEM if struck else 0)
        assert reserved() == before
    assert nth > 1
    assert mm.stats()["regions"] == 2
