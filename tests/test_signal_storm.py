# SPDX-License-Identifier: MIT
"""Signals without SA_RESTART, thousands a second, into every public call: no caller notices."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tally
from calls import CALLS, OK, Call, World, world
from injecting import OPERATIONS, Operation, check_all_is_well
from injecting_device import DEVICE_OPERATIONS
from seams import needs

import pymirror as pm

KIND = "signal storm"
GAP_S = 0.0002
ROUNDS = 3

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def features() -> None:
    needs("uffd_events", "pagemap", "event_fork", "move")


@contextmanager
def storm() -> Iterator[None]:
    """A timer's signals, and another thread's to this one, where it runs and where it sleeps.

    Python installs its handlers without SA_RESTART.
    """
    arrived = [0]

    def count(number: int, frame: object) -> None:
        arrived[0] += 1

    before = {number: signal.signal(number, count) for number in (signal.SIGALRM, signal.SIGUSR1)}
    over, target = threading.Event(), threading.get_ident()

    def send() -> None:
        while not over.wait(GAP_S):
            signal.pthread_kill(target, signal.SIGUSR1)

    sender = threading.Thread(target=send)
    timer = signal.setitimer(signal.ITIMER_REAL, GAP_S, GAP_S)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()
        signal.setitimer(signal.ITIMER_REAL, *timer)
        for number, handler in before.items():
            signal.signal(number, handler)
        tally.add(KIND, signals=arrived[0])


@pytest.mark.parametrize("operation", [*OPERATIONS, *DEVICE_OPERATIONS], ids=lambda operation: operation.name)
@pytest.mark.root
def test_operations(operation: Operation) -> None:
    tally.add(KIND, operations=ROUNDS)
    with tally.timed(KIND):
        for _ in range(ROUNDS):
            with storm(), operation.opens() as made:
                operation.prepare(made)
                operation.run(made)
                operation.done(made)
                check_all_is_well(made)


def outcome(call: Call, made: World) -> int:
    try:
        call.run(made)
    except pm.MirrorError as error:
        return error.errno or -1
    return OK


@pytest.mark.root
def test_every_public_call() -> None:
    with tally.timed(KIND):
        for call in CALLS:
            with world() as made:
                calm = outcome(call, made)
            with world() as made, storm():
                assert outcome(call, made) == calm, call.name
            tally.add(KIND, operations=1)
