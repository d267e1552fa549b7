"""An invalidation race, shown and survived: the CPU's page table changes after the driver has looked at it.

No luck is needed: the driver stops between its two steps, as a slow one would, and the change is made there.
"""

import mmap
import threading

import pymirror as pm

PAGE = 4096


class Driver(pm.Mirror):
    def __init__(self, mm: pm.AddressSpace, dev: pm.Device) -> None:
        self.dev = dev
        self.looked, self.go_on = threading.Event(), threading.Event()
        super().__init__(mm)
        dev.set_fault_handler(self.fault)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        with self.lock:
            cleared = self.dev.page_table.clear(update.start, update.end)
        print(f"CPU     {update.event.name} ({update.guarantee}): {cleared} device entries to clear")

    def fault(self, fault: pm.DeviceFault) -> None:
        with self.range(fault.addr, fault.addr + PAGE) as rng:
            rng.default_flags = pm.HMM_PFN_REQ_FAULT
            for attempt in range(1, 10):
                rng.wait_until_valid(timeout=1.0)
                seq = rng.fault()
                print(f"driver  looks, attempt {attempt}: sequence {seq}")
                self.looked.set()
                self.go_on.wait(10)
                with self.lock:
                    mapped = self.dev.page_table.map(rng, seq)
                print(f"driver  programs the device with what it saw: {'done' if mapped else 'refused'}")
                if mapped:
                    return


with pm.AddressSpace() as mm:
    dev = pm.Device("d0")
    with Driver(mm, dev) as driver:
        buf = mm.mmap(PAGE)
        text = memoryview(buf).cast("B")
        text[:6] = b"before"
        reader = threading.Thread(target=lambda: print("device  reads", dev.read(mm, buf.addr, 6)))
        reader.start()

        driver.looked.wait(10)
        mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
        text[:6] = b"after!"
        print("CPU     has thrown the page away and written another")
        driver.go_on.set()
        reader.join()
        del text
