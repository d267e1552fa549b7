# SPDX-License-Identifier: MIT
"""A handler of a signal touches device memory at every named point of every operation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tally
from conductor import POINTS, conducted
from injecting import OPERATIONS, Operation, Space, check_all_is_well
from injecting_device import DEVICE_OPERATIONS
from mirroring import PAGE
from seams import errno_of, needs

import pymirror as pm

KIND = "signals at named points"
pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]


@contextmanager
def counted(made: Space) -> Iterator[int]:
    """The address of a word on a device, whose page a handler brings home."""
    mm = made.mm
    word = mm.mmap(PAGE)
    with pm.DeviceMemory(None, PAGE) as vram:
        assert pm.migrate_to_device(mm, word.addr, word.addr + PAGE, vram) == 1
        yield word.addr
    word.close()


# A thread that waits for itself is never back in Python.
@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("operation", [*OPERATIONS, *DEVICE_OPERATIONS], ids=lambda operation: operation.name)
def test_a_handler_that_touches(operation: Operation) -> None:
    needs("uffd_kernel", "uffd_events", "pagemap", "event_fork", "sigbus", "move")
    tally.add(KIND, operations=1)
    with tally.timed(KIND), operation.opens() as made, counted(made) as word:
        operation.prepare(made)
        # Page 2 may go in the middle of the operation.
        pages = [made.page(n) for n in range(8) if n != 2]
        with conducted(list(POINTS), pages, word) as met:
            # What a handler has brought home need not go.
            code = errno_of(operation.run, made)
        assert int.from_bytes(ctypes.string_at(word, 8), "little") == met.handled
        assert met.handled <= len(met.points)
        tally.add(KIND, points=len(met.points), handled=met.handled)
        assert code in {0} | operation.also
        if not code:
            operation.done(made)
        check_all_is_well(made)
