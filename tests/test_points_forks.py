# SPDX-License-Identifier: MIT
"""A fork of libc's at every named point of every operation: neither side loses a byte, and nothing hangs."""

from __future__ import annotations

import errno

import pytest
import tally
from conductor import FORKS, POINTS, Fork, conducted
from injecting import OPERATIONS, Operation, check_all_is_well
from injecting_device import DEVICE_OPERATIONS
from mirroring import PAGE
from seams import WAIT_S, errno_of, needs

KIND = "forks at named points"
READABLE = (0, 1, 3, 4, 5, 6, 7, 2)  # page 2 may be unmapped, or moved away
UNREADABLE = 1 << 8  # the wait status of a child that could not read the last of them
pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]


def check(fork: Fork, before: bytes, after: bytes, gone: bool) -> None:
    """The child has each page as it was before the operation, or after; ``gone``: page 2 may be anybody's."""
    assert fork.status in (0, UNREADABLE), f"{fork.point}: wait status {fork.status:#x}"
    for n, found in zip(READABLE, fork.pages, strict=True):
        if n == READABLE[-1] and (fork.status or gone):
            continue
        at = slice(n * PAGE, (n + 1) * PAGE)
        assert found in (before[at], after[at]), f"{fork.point}: page {n} of the child"


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("operation", [*OPERATIONS, *DEVICE_OPERATIONS], ids=lambda operation: operation.name)
def test_a_fork(operation: Operation) -> None:
    needs("uffd_kernel", "uffd_events", "pagemap", "event_fork", "sigbus", "move")
    tally.add(KIND, operations=1)
    with tally.timed(KIND), operation.opens() as made:
        operation.prepare(made)
        before = bytes(made.expected)
        made.driver.device.fault_timeout = 3 * WAIT_S  # each fork takes what it has mapped
        names = [name for name in POINTS if name not in FORKS]
        with conducted(names, [made.page(n) for n in READABLE], forks=True) as met:
            code = errno_of(operation.run, made)
        tally.add(KIND, forks=len(met.forks))
        made.mm.sync()
        assert code in {0, errno.EAGAIN, errno.EBUSY} | operation.also
        if not code:
            operation.done(made)
        assert len(met.forks) == len(met.points)
        for fork in met.forks:
            check(fork, before, bytes(made.expected), made.gone)
        check_all_is_well(made)
