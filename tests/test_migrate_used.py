"""Device memory that is used: what it permits, and what the device reads and writes where it is."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from migrating import PAGES, pattern, patterned, to_device
from mirroring import PAGE, every_delivery
from racing import in_child
from seams import Background, errno_of, inject, needs, points

import pymirror as pm

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")]


mm = every_delivery


class TestProtection:
    """Bits of device pages, as the kernel has them in its entries: see docs/fidelity.md."""

    @staticmethod
    def snapshot(mm: pm.AddressSpace, buf: pm.Region, owner: object) -> np.ndarray[Any, np.dtype[np.uint64]]:
        pfns = np.zeros(buf.size // PAGE, np.uint64)
        sub = pm.IntervalNotifier(mm, buf.addr, buf.size, lambda sub, update, seq: sub.set_seq(seq) or True)
        pm.hmm_range_fault(
            sub,
            buf.addr,
            buf.addr + buf.size,
            pfns,
            seq=sub.read_begin(),
            dev_private_owner=owner,
        )
        sub.remove()
        return pfns

    def test_the_owner_sees_its_pages(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        pfns = self.snapshot(mm, buf, vram.owner)
        assert pm.is_device_private_pfn(pfns).all()
        assert ((pfns & np.uint64(pm.HMM_PFN_WRITE)) != 0).all()
        assert np.unique(pm.hmm_pfn_to_pfn(pfns)).size == PAGES
        assert not self.snapshot(mm, buf, object()).any()
        assert not self.snapshot(mm, buf, None).any()

    @pytest.mark.parametrize("change", ["mprotect", "fork"])
    def test_read_only_from_then_on(self, mm: pm.AddressSpace, vram: pm.DeviceMemory, change: str) -> None:
        needs("wp_async", "event_fork")
        buf = patterned(mm)
        to_device(buf, vram)
        if change == "fork":
            assert in_child(lambda: None) == 0
        else:
            mm.mprotect(buf.addr, buf.size, 1)
            mm.mprotect(buf.addr, buf.size, 3)
        pfns = self.snapshot(mm, buf, vram.owner)
        assert pm.is_device_private_pfn(pfns).all()
        assert not (pfns & np.uint64(pm.HMM_PFN_WRITE)).any()
        assert buf[0] == pattern(PAGES)[0]
        assert not int(self.snapshot(mm, buf, None)[0]) & pm.HMM_PFN_WRITE
        buf[0] = 1
        assert int(self.snapshot(mm, buf, None)[0]) & pm.HMM_PFN_WRITE

    def test_mprotect_that_is_refused(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        with inject("MPROTECT", err=errno.EACCES):
            assert errno_of(mm.mprotect, buf.addr, buf.size, 1) == errno.EACCES
        assert ((self.snapshot(mm, buf, vram.owner) & np.uint64(pm.HMM_PFN_WRITE)) != 0).all()

    def test_mprotect_up_to_a_hole(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf = patterned(mm)
        to_device(buf, vram)
        mm.munmap(buf.addr + 5 * PAGE, PAGE)
        assert errno_of(mm.mprotect, buf.addr, buf.size, 1) == errno.ENOMEM
        writable = (self.snapshot(mm, buf, vram.owner) & np.uint64(pm.HMM_PFN_WRITE)) != 0
        assert not writable[:6].any()
        assert writable[6:].all()


@pytest.mark.needs("process_vm")
class TestAccessByTheDevice:
    """A device reads and writes its own memory where it is."""

    def test_it_stays_there(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf, dev = patterned(mm), vram.device
        to_device(buf, vram)
        mapped(mm, buf, vram)
        assert dev.read(mm, buf.addr, buf.size) == pattern(PAGES).tobytes()
        dev.write(mm, buf.addr + PAGE - 2, b"over the edge")
        assert vram.used == buf.size
        assert mm.stats()["device_faults"] == 0
        assert bytes(buf[PAGE - 2 : PAGE + 11]) == b"over the edge"
        assert vram.used == buf.size - 2 * PAGE

    def test_pages_here_and_there(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf, dev = patterned(mm), vram.device
        for page in range(0, PAGES, 3):
            pm.migrate_to_device(mm, buf.addr + page * PAGE, buf.addr + (page + 1) * PAGE, vram)
        mapped(mm, buf, vram)
        assert dev.read(mm, buf.addr, buf.size) == pattern(PAGES).tobytes()
        dev.write(mm, buf.addr, pattern(PAGES)[::-1].tobytes())
        assert bytes(buf[:]) == pattern(PAGES)[::-1].tobytes()

    def test_what_nobody_touched(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf, dev = mm.mmap(PAGES * PAGE), vram.device
        to_device(buf, vram)
        mapped(mm, buf, vram)
        assert dev.read(mm, buf.addr, buf.size) == bytes(buf.size)
        dev.write(mm, buf.addr + 7, b"first")
        assert bytes(buf[7:12]) == b"first"

    def test_a_cpu_fault_fences_its_entry(self, mm: pm.AddressSpace, vram: pm.DeviceMemory) -> None:
        buf, dev = patterned(mm), vram.device
        to_device(buf, vram)
        mapped(mm, buf, vram)
        dev.set_fault_handler(None)
        buf[2 * PAGE] = 9
        with pytest.raises(pm.MirrorError) as refused:
            dev.read(mm, buf.addr + 2 * PAGE, 1)
        assert refused.value.errno == errno.EFAULT
        assert dev.read(mm, buf.addr, PAGE) == pattern(PAGES)[:PAGE].tobytes()

    def test_a_read_leaves_nothing_in_the_slot_of_a_page_that_went_home(
        self, mm: pm.AddressSpace, vram: pm.DeviceMemory
    ) -> None:
        """What is in a slot is the next page's: the device and the CPU would not see the same."""
        buf, dev = patterned(mm, 1), vram.device
        to_device(buf, vram)
        mapped(mm, buf, vram)
        dev.set_fault_handler(None)
        with points("ACCESS_LOOKED_UP") as looked_up:
            read = Background(dev.read, mm, buf.addr, PAGE)
            looked_up.wait()
            assert pm.migrate_to_system(mm, buf.addr, buf.addr + PAGE) == 1
            looked_up.release()
            assert errno_of(read.result) == errno.EFAULT
        assert to_device(buf, vram) == 1
        mapped(mm, buf, vram)
        assert dev.read(mm, buf.addr, PAGE) == pattern(1).tobytes()
        dev.write(mm, buf.addr, b"device")
        assert bytes(buf[:8]) == b"device" + pattern(1)[6:8].tobytes()


def mapped(mm: pm.AddressSpace, buf: pm.Region, vram: pm.DeviceMemory) -> None:
    """Map all of it for the device, its own memory as it is."""
    pfns = np.zeros(buf.size // PAGE, np.uint64)
    lock = pm.DriverLock()

    def invalidate(sub: pm.IntervalNotifier, update: pm.MmuNotifierRange, seq: int) -> bool:
        with lock:
            sub.set_seq(seq)
            vram.device.page_table.clear(update.start, update.end)
        return True

    sub = pm.IntervalNotifier(mm, buf.addr, buf.size, invalidate)
    seq = sub.read_begin()
    pm.hmm_range_fault(
        sub,
        buf.addr,
        buf.addr + buf.size,
        pfns,
        default_flags=pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE,
        seq=seq,
        dev_private_owner=vram.owner,
    )
    with lock:
        assert vram.device.page_table.map(sub, seq, buf.addr, pfns)
