"""A notifier that prints what it is told: each kind of change, and how it was learnt (the guarantee)."""

import ctypes
import errno
import mmap
import os

import pymirror as pm

PAGE = 4096
LIBC = ctypes.CDLL(None, use_errno=True)


class Printer(pm.MmuNotifier):
    def invalidate_range_start(self, range: pm.MmuNotifierRange) -> None:
        pages = (range.end - range.start) // PAGE
        print(f"    {range.event.name:15} {range.guarantee:9} {pages if pages < 1 << 20 else 'all'} pages")

    def release(self) -> None:
        print("    release")


def behind_its_back(name: str, *args: int) -> None:
    """As another library would call libc."""
    if getattr(LIBC, name)(*map(ctypes.c_long, args)) == -1:
        raise OSError(ctypes.get_errno(), name)


with pm.AddressSpace() as mm:
    printer = Printer(mm)
    buf, shared = mm.mmap(16 * PAGE), mm.mmap(PAGE, shared=True)
    memoryview(buf).cast("B")[:] = bytes(buf.size)

    print("Operations of the library are told before the change is made:")
    mm.mprotect(buf.addr, PAGE, mmap.PROT_READ)
    mm.madvise(buf.addr + PAGE, 2 * PAGE, mmap.MADV_DONTNEED)
    mm.munmap(buf.addr, PAGE)
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    mm.sync()  # callbacks of what the kernel tells run in a thread of their own

    print("Calls behind its back: madvise before, munmap after the change, but before the call returns:")
    behind_its_back("madvise", buf.addr + 2 * PAGE, PAGE, mmap.MADV_DONTNEED)
    behind_its_back("munmap", buf.addr + 4 * PAGE, 2 * PAGE)
    mm.sync()

    print("A hole in a file: nobody tells; found when page tables are compared, here by a snapshot:")
    dev = pm.Device("d0")
    with pm.Mirror(mm) as mirror, mirror.range(shared.addr, shared.addr + PAGE) as rng:
        rng.default_flags = pm.HMM_PFN_REQ_FAULT
        dev.page_table.map(rng, rng.fault())
        behind_its_back("fallocate", shared.fd, 3, 0, PAGE)  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        try:
            rng.snapshot()
        except OSError as error:
            print("    the snapshot is told to go again:", errno.errorcode[error.errno])

    print("The end of the address space:")
