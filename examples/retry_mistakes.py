"""The mistakes of a retry loop, each named by the library: a stale sequence, no lock, entries not cleared."""

import contextlib
import warnings

import numpy as np

import pymirror as pm

PAGE, MADV_DONTNEED = 4096, 4


class Driver(pm.IntervalNotifier):
    def __init__(self, mm: pm.AddressSpace, buf: pm.Region) -> None:
        self.dev, self.lock, self.clears = pm.Device("d0"), pm.DriverLock("driver->update"), True
        super().__init__(mm, buf.addr, buf.size, update_lock=self.lock)

    def invalidate(self, range: pm.MmuNotifierRange, cur_seq: int) -> bool:
        with self.lock:
            self.set_seq(cur_seq)
            if self.clears:
                self.dev.page_table.clear(range.start, range.end)
        return True

    def look(self, seq: int) -> np.ndarray:
        pfns = np.zeros(self.length // PAGE, np.uint64)
        pm.hmm_range_fault(self, self.start, self.last + 1, pfns, seq=seq, default_flags=pm.HMM_PFN_REQ_FAULT)
        return pfns


with pm.AddressSpace() as mm, warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    buf = mm.mmap(4 * PAGE)
    driver = Driver(mm, buf)

    print("1. read_begin() before the loop: after one invalidation it spins until its deadline")
    seq = driver.read_begin()
    mm.madvise(buf.addr, PAGE, MADV_DONTNEED)
    for _ in range(1000):
        with contextlib.suppress(OSError):  # EBUSY: again
            driver.look(seq)
    print(f"   1000 rounds for nothing. {told[0].category.__name__}: {told[0].message}")

    print("2. read_retry() without the lock: an invalidation may pass between the look and the programming")
    pfns = driver.look(seq := driver.read_begin())  # here it belongs
    try:
        driver.read_retry(seq)
    except OSError as error:
        print("  ", error.strerror)
    with driver.lock:
        driver.dev.page_table.map(driver, seq, buf.addr, pfns)  # which looks at the sequence once more

    print("3. a callback that does not clear: fenced before it ran, so the device sees no stale page")
    driver.clears = False
    mm.madvise(buf.addr, PAGE, MADV_DONTNEED)
    try:
        driver.dev.read(mm, buf.addr, 8)
    except pm.StaleAccessError as error:
        print("  ", error.strerror)
