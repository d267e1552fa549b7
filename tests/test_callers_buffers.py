"""What an access was given is the caller's again when it is over, also while its error is alive.

Python 3.11 crashes when it collects a cycle with a memoryview that is exported still, and an error's
traceback has the frames that had it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import MADV_DONTNEED

import numpy as np
import pytest
from mirroring import PAGE, FaultDriver
from seams import needs

import pymirror as pm

Access = Callable[[pm.AddressSpace, pm.Device, memoryview], object]

HOLE = 0x1000
ACCESSES: dict[str, Access] = {
    "read_into": lambda mm, dev, view: dev.read_into(mm, HOLE, view),
    "write": lambda mm, dev, view: dev.write(mm, HOLE, view),
    "dma_read_into": lambda mm, dev, view: dev.dma_read_into(HOLE, view),
    "dma_write": lambda mm, dev, view: dev.dma_write(HOLE, view),
    "dma_write_sg": lambda mm, dev, view: dev.dma_write_sg([(HOLE, len(view))], view),
    "dma_write_sg, too long": lambda mm, dev, view: dev.dma_write_sg([(HOLE, 1)], view),
}


@pytest.mark.parametrize("name", ACCESSES)
def test_a_refused_access_lets_go_of_the_buffer(mm: pm.AddressSpace, name: str) -> None:
    view = memoryview(bytearray(16))
    with pytest.raises(pm.MirrorError) as refused:
        ACCESSES[name](mm, pm.Device("d"), view)
    view.release()
    assert refused.value.errno


@pytest.mark.parametrize("write", [False, True])
def test_a_refused_access_through_a_pin_lets_go_of_the_buffer(mm: pm.AddressSpace, write: bool) -> None:
    needs("io_uring")
    view = memoryview(bytearray(16))
    with mm.mmap(PAGE) as buf, pm.pin_user_pages(mm, buf.addr, 1) as pin:
        with pytest.raises(pm.MirrorError) as refused:
            (pin.write if write else pin.read_into)(PAGE, view)
        view.release()
    assert refused.value.errno


@contextmanager
def errors_in_cycles() -> Iterator[list[pm.MirrorError]]:
    """Filled at the end: the errors that only the collector would get rid of."""
    left: list[pm.MirrorError] = []
    gc.collect()
    gc.disable()
    try:
        yield left
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left += [one for one in gc.garbage if isinstance(one, pm.MirrorError)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_a_fault_that_was_retried_leaves_no_cycle(mm: pm.AddressSpace) -> None:
    needs("pagemap", "populate", "pfn")
    with FaultDriver(mm) as driver, mm.mmap(PAGE) as buf:
        driver.device.read(mm, buf.addr, 1)
        with errors_in_cycles() as left:
            # It breaks the zero page's copy-on-write: changed unseen, and walked again.
            driver.device.write(mm, buf.addr, b"x")
        assert left == []


def test_a_refused_walk_leaves_no_cycle(mm: pm.AddressSpace) -> None:
    with mm.mmap(PAGE) as buf:
        sub = pm.IntervalNotifier(mm, buf.addr, PAGE, lambda sub, update, seq: sub.set_seq(seq))
        seq = sub.read_begin()
        mm.madvise(buf.addr, PAGE, MADV_DONTNEED)
        with errors_in_cycles() as left, pytest.raises(pm.MirrorError):
            pm.hmm_range_fault(sub, buf.addr, buf.addr + PAGE, np.zeros(1, np.uint64), seq=seq)
        sub.remove()
        assert left == []
