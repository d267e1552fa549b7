"""The known problem of pinning drivers: after munmap and mmap at one address the device reads the old page.

The pins are real. A registration cache keeps them, by address; the process gives the memory back and gets
other memory at the same address, as malloc does all day. The cure is a notifier: half of what a mirror is.
"""

import pymirror as pm
from pymirror.drivers.pinned import Pinned

PAGE = 4096


def life_of_a_buffer(mm: pm.AddressSpace, driver: Pinned) -> None:
    buf = mm.mmap(PAGE)
    addr = buf.addr
    buf[0:6] = b"first!"
    print("  the device reads", driver.read(addr, 6), "- pinned, mapped and kept in the cache")

    again = mm.mmap(PAGE)
    again[0:6] = b"second"
    mm.munmap(addr, PAGE)
    mm.mremap(again.addr, PAGE, PAGE, flags=pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED, new_addr=addr)
    print("  munmap(), and other memory at the same address: the CPU reads b'second'")

    seen = driver.read(addr, 6)
    print("  the device reads", seen, "- STALE" if seen == b"first!" else "- as the CPU does")
    stats = driver.stats
    print(f"  cache: {stats.hits} hits, {stats.misses} misses, {stats.invalidations} taken out by a notifier")


with pm.AddressSpace() as mm:
    try:
        mm.features.require("io_uring", "this example")
    except pm.FeatureError as missing:
        raise SystemExit(print(missing)) from None

    print("A registration cache that nobody tells of changes:")
    with Pinned(mm) as driver:
        life_of_a_buffer(mm, driver)

    print("The same with notified=True:")
    with Pinned(mm, notified=True) as driver:
        life_of_a_buffer(mm, driver)
