"""The retry loop of the kernel's Documentation/mm/hmm.rst, on this process's real memory."""

import errno
import mmap

import numpy as np

import pymirror as pm


class Driver(pm.Mirror):
    def __init__(self, mm: pm.AddressSpace, dev: pm.Device) -> None:
        self.dev = dev
        super().__init__(mm)
        dev.set_fault_handler(self.fault)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        with self.lock:
            cleared = self.dev.page_table.clear(update.start, update.end)
        print(f"  {update.event.name:15} {update.guarantee:8} {cleared:5} device entries cleared")

    def fault(self, fault: pm.DeviceFault) -> None:
        with self.range(fault.addr, fault.end) as rng:
            rng.default_flags = pm.HMM_PFN_REQ_FAULT | (pm.HMM_PFN_REQ_WRITE if fault.write else 0)
            while True:
                rng.wait_until_valid(timeout=1.0)
                try:
                    seq = rng.fault()
                except OSError as error:
                    if error.errno in (errno.EBUSY, errno.EAGAIN):
                        continue
                    raise
                with self.lock:
                    if rng.valid and self.dev.page_table.map(rng, seq):
                        print(f"  device fault    {rng.npages:14} pages mapped")
                        return


with pm.AddressSpace() as mm:
    dev = pm.Device("d0")
    with Driver(mm, dev):
        buf = mm.mmap(16 * pm.MiB)
        data = np.frombuffer(buf, np.uint64)
        data[:] = np.arange(data.size)

        print("The device sums what the CPU wrote:")
        seen = np.empty_like(data)
        dev.read_into(mm, buf.addr, seen)
        print(f"  {seen.sum():,} == {data.sum():,}")

        print("The CPU discards half of it, and the device looks again:")
        mm.madvise(buf.addr, buf.size // 2, mmap.MADV_DONTNEED)
        dev.read_into(mm, buf.addr, seen)
        print(f"  {seen.sum():,} == {data.sum():,}")

        print("The device writes, the CPU reads:")
        dev.write(mm, buf.addr, b"from the device!")
        print(f"  {bytes(memoryview(buf)[:16])!r}")
        del data
