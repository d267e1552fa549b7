"""The retry loop of today's kernel: an interval notifier, its sequence number, and hmm_range_fault()."""

import errno
import mmap

import numpy as np

import pymirror as pm

PAGE = 4096


class Driver(pm.IntervalNotifier):
    def __init__(self, mm: pm.AddressSpace, dev: pm.Device, start: int, length: int) -> None:
        self.dev = dev
        self.lock = pm.DriverLock("driver->update")
        super().__init__(mm, start, length)

    def invalidate(self, range: pm.MmuNotifierRange, cur_seq: int) -> bool:
        with self.lock:
            self.set_seq(cur_seq)
            cleared = self.dev.page_table.clear(range.start, range.end)
        print(f"  {range.event.name}, {range.guarantee}, sequence {cur_seq}: {cleared} entries cleared")
        return True

    def fault(self, fault: pm.DeviceFault) -> None:
        end = min(fault.end, self.start + self.length)
        pfns = np.zeros((end - fault.addr) // PAGE, np.uint64)
        request = pm.HMM_PFN_REQ_FAULT | (pm.HMM_PFN_REQ_WRITE if fault.write else 0)
        while True:
            seq = self.read_begin(timeout=1.0)
            try:
                pm.hmm_range_fault(self, fault.addr, end, pfns, seq=seq, default_flags=request)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    continue
                raise
            with self.lock:
                if not self.read_retry(seq) and self.dev.page_table.map(self, seq, fault.addr, pfns):
                    break
        writable = int(((pfns & pm.HMM_PFN_WRITE) != 0).sum())
        print(f"  device fault, sequence {seq}: {pfns.size} pages mapped, {writable} of them writable")


with pm.AddressSpace() as mm:
    dev = pm.Device("d0")
    buf = mm.mmap(64 * PAGE)
    memoryview(buf).cast("B")[:] = b"\1" * buf.size
    driver = Driver(mm, dev, buf.addr, buf.size)
    dev.set_fault_handler(driver.fault)

    print("The device reads all of it, and sums", sum(dev.read(mm, buf.addr, buf.size)))
    print("A quarter becomes read-only, another is thrown away:")
    mm.mprotect(buf.addr, 16 * PAGE, mmap.PROT_READ)
    mm.madvise(buf.addr + 16 * PAGE, 16 * PAGE, mmap.MADV_DONTNEED)
    print("The device reads again, and sums", sum(dev.read(mm, buf.addr, buf.size)))
    driver.remove()
