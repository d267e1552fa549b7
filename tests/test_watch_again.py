# SPDX-License-Identifier: MIT
"""Memory that is watched already and is watched again, while an event is unread."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
from mirroring import PAGE, WRITE, FaultDriver
from racing import raw_clone, wait_for, watched
from seams import Background, foreign, needs, points

import pymirror as pm


@pytest.mark.timeout(30)
def test_a_file_in_memory_that_was_write_protected_after_a_fork(mm: pm.AddressSpace) -> None:
    """Registered for missing pages alone it would keep its uffd-wp bits, which nothing ends then.

    No page of it would ever be found writable again.
    """
    needs("uffd_kernel", "event_fork", "wp_async", "pagemap")
    fd = os.memfd_create("pymirror-test")
    os.pwrite(fd, b"\5" * 4 * PAGE, 0)
    buf = mm.mmap(4 * PAGE, fd=fd)
    os.close(fd)
    np.frombuffer(buf, np.uint8)[:] = 6
    mm.watch(buf.addr, buf.addr + buf.size, files=True)
    assert wait_for(raw_clone()) == 0
    mm.sync()
    other = watched(mm)
    with points("MONITOR_POLLED") as there:
        zap = Background(foreign.madvise, other.addr, PAGE, mmap.MADV_DONTNEED)
        there.wait()
        mm.watch(buf.addr, buf.addr + buf.size, files=True)
        there.release()
        zap.result()
    with FaultDriver(mm) as driver:
        driver.map(buf.addr, buf.addr + buf.size, WRITE)
        assert driver.device.read(mm, buf.addr, buf.size) == b"\6" * buf.size
