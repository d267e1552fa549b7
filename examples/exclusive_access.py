"""A counter that CPU and device increment: atomics, on a page that the device has to itself meanwhile."""

import numpy as np

import pymirror as pm

dev, lock = pm.Device("gpu"), pm.DriverLock()
PAGE = 4096


def invalidate(sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
    with lock:
        sub.set_seq(seq)
        dev.page_table.clear(update.start, update.end)
    return True


def take(sub: pm.IntervalNotifier) -> pm.DeviceExclusive:
    """Nobody but the device reaches the page, until the CPU touches it."""
    while True:
        page = pm.make_device_exclusive(sub.mm, sub.start, dev)
        seq = sub.read_begin()  # after it, for it is an invalidation itself
        with lock:
            if dev.page_table.map(sub, seq, sub.start, page.pfns):
                return page
        print("  the CPU was faster")


# Inline: the thread that touches serves its own fault, which an ordinary user can have too.
with pm.AddressSpace(fault_delivery="inline") as mm:
    buf = mm.mmap(PAGE)
    counter = np.frombuffer(buf, np.uint64)
    counter[0] = 100
    sub = pm.IntervalNotifier(mm, buf.addr, buf.size, invalidate)

    print("The device takes the page, and counts:")
    page = take(sub)
    for _ in range(3):
        print(f"  atomic_add: it was {dev.atomic_add(mm, buf.addr, 1)}")
    print(f"  pages that the device has to itself: {page.held}")

    print("The CPU counts too, which ends that:")
    counter[0] += 1
    mm.sync()  # callbacks for a CPU fault come after it, entries were fenced before
    print(f"  the CPU reads {counter[0]}; pages that the device has to itself: {page.held}")

    print("An atomic needs the page again:")
    try:
        dev.atomic_add(mm, buf.addr, 1)
    except OSError as error:
        print(f"  refused: {error}")
    with take(sub):
        old = dev.compare_and_swap(mm, buf.addr, 104, 0)
        print(f"  compare_and_swap of 104: it was {old}")
    print(f"  the CPU reads {counter[0]}")
    sub.remove()
    del counter
