"""Why HMM has sequence numbers: the valid flag of 5.1 does not see a change that is over (ABA).

Linux 5.1 set a range's `valid` flag false when an invalidation began and true again when the last one ended.
A driver that looked at the page table before, and at the flag after, mapped a page that was gone.
"""

import pymirror as pm

MADV_DONTNEED = 4


class ValidFlag(pm.MmuNotifier):
    """The flag, kept as 5.1 kept it."""

    def __init__(self, mm):
        self.running = 0
        self.valid = True
        super().__init__(mm)

    def invalidate_range_start(self, update):
        self.running += 1
        self.valid = False

    def invalidate_range_end(self, update):
        self.running -= 1
        self.valid = self.running == 0


with pm.AddressSpace() as mm, pm.Mirror(mm) as mirror:
    buf = mm.mmap(4096)
    memoryview(buf).cast("B")[:6] = b"before"
    flag = ValidFlag(mm)
    with mirror.range(buf.addr, buf.addr + buf.size) as rng:
        rng.default_flags = pm.HMM_PFN_REQ_FAULT
        seq = rng.fault()
        print("The driver has looked at the page table; then the CPU throws the page away and writes anew.")
        mm.madvise(buf.addr, buf.size, MADV_DONTNEED)
        memoryview(buf).cast("B")[:6] = b"after!"

        print(f"  5.1's flag says valid:     {flag.valid}")
        print(f"  the sequence says valid:   {rng.valid}")
        print(f"  programming is refused:    {not pm.Device('d').page_table.map(rng, seq)}")
        rng.wait_until_valid()
        print(f"  looked at again, it maps:  {pm.Device('d').page_table.map(rng, rng.fault())}")
    flag.unregister()
