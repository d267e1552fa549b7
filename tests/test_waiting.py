"""Slow waits for Python's locks are told on the status page while they last, and not a moment longer."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from seams import WAIT_S, Background, errno_of

import pymirror as pm
from pymirror.inspection import look_at
from pymirror.inspection.status import Wait


def shown() -> list[Wait]:
    return look_at(os.getpid()).waits()


def eventually(wanted: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def held(lock: pm.DriverLock) -> Iterator[int]:
    """Held by another thread, whose tid it gives."""
    tids: list[int] = []
    has, end = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            tids.append(threading.get_native_id())
            has.set()
            end.wait()

    holder = Background(hold)
    has.wait()
    try:
        yield tids[0]
    finally:
        end.set()
        holder.result()


@pytest.fixture
def lock() -> pm.DriverLock:
    return pm.DriverLock("the driver's")


def test_a_wait_for_a_driver_lock_is_told_while_it_lasts(mm: pm.AddressSpace, lock: pm.DriverLock) -> None:
    def take() -> None:
        with lock:
            pass

    with held(lock) as holder:
        waiter = Background(take)
        eventually(lambda: bool(shown()))
        (wait,) = shown()
        assert (wait.lock, wait.holder_tid) == ("the driver's", holder)
        assert 0 < wait.held_since_ns <= wait.since_ns + 10**9
    waiter.result()
    assert shown() == []


def test_a_wait_that_gives_up_is_told_no_more(mm: pm.AddressSpace, lock: pm.DriverLock) -> None:
    with held(lock):
        waiter = Background(lock.acquire, 1.0)
        eventually(lambda: bool(shown()))
        assert waiter.result() is False
        assert shown() == []
        assert not lock.acquire(0)


def test_a_wait_for_the_mmap_lock_is_told_until_it_is_given_up(mm: pm.AddressSpace) -> None:
    with mm.read_lock():
        closing = Background(errno_of, mm.close, 1.0)
        eventually(lambda: bool(shown()))
        (wait,) = shown()
        assert wait.lock == "mmap lock (read)"
        assert wait.holder_tid == threading.get_native_id()
        assert closing.result() != 0
        assert shown() == []


def test_more_waits_than_there_is_room_for_are_told_in_part(mm: pm.AddressSpace) -> None:
    lock = pm.DriverLock("wide" * 20)
    many = 7
    with held(lock):
        waiters = [Background(lock.acquire, 2.0) for _ in range(many)]
        eventually(lambda: len(shown()) == 4)
        assert {wait.lock for wait in shown()} == {("wide" * 20)[:39]}
        assert [waiter.result() for waiter in waiters] == [False] * many
    assert shown() == []
