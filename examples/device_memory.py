"""Pages move to a device in the kernel's three steps; a CPU touch and an eviction bring them home."""

import numpy as np

import pymirror as pm

PAGE = 4096


class Driver(pm.Mirror):
    """Told before pages move, either way: its device may not use them any more."""

    def __init__(self, mm: pm.AddressSpace, dev: pm.Device, vram: pm.DeviceMemory) -> None:
        self.dev, self.vram = dev, vram
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        self.dev.page_table.clear(update.start, update.end)
        if update.event is pm.Event.MIGRATE:
            print(f"    told: MIGRATE of {(update.end - update.start) // PAGE} page(s)")

    def migrate(self, start: int, end: int) -> None:
        with pm.migrate_vma_setup(self.mm, start, end, self.vram) as args:
            chosen = (args.src & pm.MIGRATE_PFN_MIGRATE) != 0
            chosen[0] = False  # a driver may leave out what it likes
            args.dst[:] = args.alloc_pages(chosen)
            moved = pm.migrate_vma_pages(args)
        print(f"  setup found {args.cpages} pages, pages moved {moved}, finalize ended it")

    def evict(self) -> None:
        """Whoever the pages belong to: by PFN of the device memory."""
        found = pm.migrate_device_range(self.vram, self.vram.pfns.start, len(self.vram.pfns))
        found.dst[:] = pm.MIGRATE_PFN_VALID
        print(f"  {pm.migrate_device_pages(found)} pages went home")


# Inline: the thread that touches serves its own fault, which an ordinary user can have too.
dev = pm.Device("gpu")
with pm.AddressSpace(fault_delivery="inline") as mm, pm.DeviceMemory(dev, 16 * PAGE) as vram:
    buf = mm.mmap(8 * PAGE)
    data = np.frombuffer(buf, np.uint8)
    data[:] = np.arange(8).repeat(PAGE)
    with Driver(mm, dev, vram) as driver:
        print("Eight pages, of which the driver takes seven:")
        driver.migrate(buf.addr, buf.addr + buf.size)
        print(f"  on the device: {vram.holds(buf.addr, buf.addr + buf.size).astype(int)}")
        print("The CPU touches one:")
        read = data[3 * PAGE]
        mm.sync()  # callbacks for a CPU fault come after it, entries were fenced before
        print(f"  it reads {read}")
        print(f"  on the device: {vram.holds(buf.addr, buf.addr + buf.size).astype(int)}")
        print("The device's memory is wanted for something else:")
        driver.evict()
        print(f"  the CPU reads {data[::PAGE]}")
    del data
