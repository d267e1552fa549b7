"""Pinned pages: what a pin holds, and how it is read and written."""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mirroring import FAULT, PAGE, Driver, filled
from pinning import FLAGS, kept, pins_of_the_kernel
from seams import errno_of, foreign, needs

import pymirror as pm

HUGE = 2 << 20


class TestThePage:
    def test_is_the_kernels_pin(self, mm: pm.AddressSpace) -> None:
        before = kept()
        buf = filled(mm, 16)
        pin = pm.pin_user_pages(mm, buf.addr, 16, FLAGS)
        assert kept() - before == 16 * PAGE
        assert (mm.stats()["pins"], mm.stats()["pinned_pages"]) == (1, 16)
        pm.unpin_user_pages(pin)
        assert kept() == before
        assert (mm.stats()["pins"], mm.stats()["pinned_pages"]) == (0, 0)

    @pytest.mark.root
    def test_is_in_the_machines_count(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 2000)
        acquired, _ = pins_of_the_kernel()
        pin = pm.pin_user_pages(mm, buf.addr, 2000)
        held, released = pins_of_the_kernel()
        assert held - acquired >= 2000
        pm.unpin_user_pages(pin)
        assert pins_of_the_kernel()[1] - released >= 2000

    def test_stays_after_dontneed(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 4)
        content = bytes(buf)
        with pm.pin_user_pages(mm, buf.addr, 4) as pin:
            mm.madvise(buf.addr, 4 * PAGE, mmap.MADV_DONTNEED)
            assert bytes(buf) == bytes(4 * PAGE)
            assert pin.read() == content
            pin.write(0, b"to the old page")
            assert bytes(buf[0:15]) == bytes(15)
            assert pin.read(0, 15) == b"to the old page"

    @pytest.mark.parametrize("who", ["mm", "foreign"])
    def test_stays_after_munmap(self, mm: pm.AddressSpace, who: str) -> None:
        buf = filled(mm, 4)
        content = bytes(buf)
        with pm.pin_user_pages(mm, buf.addr, 4) as pin:
            (mm if who == "mm" else foreign).munmap(buf.addr, 4 * PAGE)
            assert pin.read() == content

    def test_moves_with_mremap(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 2)
        with pm.pin_user_pages(mm, buf.addr, 2) as pin:
            moved = mm.mremap(buf.addr, 2 * PAGE, 2 * PAGE, flags=pm.MREMAP_MAYMOVE | pm.MREMAP_DONTUNMAP)
            moved[0:5] = b"moved"
            assert pin.read(0, 5) == b"moved"
            pin.write(PAGE, b"device")
            assert bytes(moved[PAGE : PAGE + 6]) == b"device"

    def test_is_not_protected_from_the_device(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        with pm.pin_user_pages(mm, buf.addr, 1) as pin:
            mm.mprotect(buf.addr, PAGE, mmap.PROT_READ)
            pin.write(0, b"device")
        assert bytes(buf[0:6]) == b"device"

    def test_is_what_the_cpu_reads_and_writes(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 2)
        with pm.pin_user_pages(mm, buf.addr, 2) as pin:
            pin.write(PAGE - 3, b"device")
            assert bytes(buf[PAGE - 3 : PAGE + 3]) == b"device"
            buf[10:13] = b"cpu"
            assert pin.read(10, 3) == b"cpu"

    def test_its_pfns_are_those_of_the_page_table(self, mm: pm.AddressSpace) -> None:
        needs("pagemap")
        buf = filled(mm, 8)
        with pm.pin_user_pages(mm, buf.addr, 8) as pin, Driver(mm) as driver:
            with driver.range(pin.start, pin.end) as rng:
                rng.snapshot()
            assert rng.pfns.tolist() == pin.pfns.tolist()
            assert ((pin.pfns >> np.uint64(62)) == 3).all()
            assert (pm.hmm_pfn_to_pfn(pin.pfns) > 0).all() == ("pfn" in mm.features)
            assert (pin.npages, pin.end - pin.start, len(pin)) == (8, 8 * PAGE, 8 * PAGE)
            with pytest.raises(ValueError, match="read-only"):
                pin.pfns[0] = 0


KINDS: dict[str, Callable[[pm.AddressSpace], pm.Region]] = {
    "private": lambda mm: mm.mmap(4 * PAGE),
    "shared": lambda mm: mm.mmap(4 * PAGE, shared=True),
    "thp": lambda mm: mm.mmap(2 * HUGE, huge="thp"),
    "hugetlb": lambda mm: mm.mmap(2 * HUGE, huge="hugetlb"),
    "shared-hugetlb": lambda mm: mm.mmap(HUGE, huge="hugetlb", shared=True),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(name, marks=pytest.mark.hugetlb if "hugetlb" in name else ()) for name in KINDS],
)
def test_kinds_of_memory(mm: pm.AddressSpace, kind: str) -> None:
    if "hugetlb" in kind:
        needs("pagemap")
    buf = KINDS[kind](mm)
    before = kept()
    with pm.pin_user_pages(mm, buf.addr + PAGE, 2) as pin:
        buf[PAGE : PAGE + 3] = b"cpu"
        pin.write(2 * PAGE - 8, b"from the")
        assert pin.read(0, 3) == b"cpu"
        assert bytes(buf[3 * PAGE - 8 : 3 * PAGE]) == b"from the"
        if "hugetlb" in kind:
            assert pm.hmm_pfn_to_map_order(pin.pfns).tolist() == [9, 9]
            # The kernel charges the whole huge page.
            assert kept() - before == HUGE
    assert kept() == before
    assert buf[0] == 0


class TestFiles:
    def test_a_private_mapping_gets_its_own_copy(self, mm: pm.AddressSpace, tmp_path: Any) -> None:
        (tmp_path / "f").write_bytes(b"on disk!" * 1024)
        with (tmp_path / "f").open("r+b") as file:
            buf = mm.mmap(2 * PAGE, fd=file.fileno())
        assert bytes(buf[0:8]) == b"on disk!"
        with pm.pin_user_pages(mm, buf.addr, 2) as pin:
            pin.write(0, b"pinned")
            assert bytes(buf[0:8]) == b"pinnedk!"
        assert (tmp_path / "f").read_bytes() == b"on disk!" * 1024

    def test_a_memfd_has_what_the_device_wrote(self, mm: pm.AddressSpace) -> None:
        buf = mm.mmap(2 * PAGE, shared=True)
        again = mm.mmap(2 * PAGE, shared=True, fd=buf.fd)
        with pm.pin_user_pages(mm, buf.addr, 2) as pin:
            pin.write(0, b"device")
            foreign.punch_hole(buf.fd, 0, PAGE)
            assert bytes(again[0:6]) == bytes(6)
            assert pin.read(0, 6) == b"device"


class TestCopyOnWrite:
    """What a pin replaces, mirrors of the memory are told before."""

    def mapped(self, mm: pm.AddressSpace, driver: Driver, buf: pm.Region) -> None:
        with driver.range(buf.addr, buf.addr + buf.size) as rng:
            rng.default_flags = FAULT
            rng.pfn_flags_mask = 0
            assert driver.device.page_table.map(rng, rng.fault())

    def test_the_zero_page(self, mm: pm.AddressSpace) -> None:
        needs("pagemap")
        buf = mm.mmap(4 * PAGE)
        with Driver(mm) as driver:
            buf[3 * PAGE] = 1
            self.mapped(mm, driver, buf)
            with pm.pin_user_pages(mm, buf.addr, 4) as pin:
                assert [(u.start, u.end, u.event, u.guarantee) for u in driver.updates] == [
                    (buf.addr, buf.addr + 3 * PAGE, pm.Event.CLEAR, pm.Guarantee.BEFORE)
                ]
                assert driver.device.page_table.next() == buf.addr + 3 * PAGE
                pin.write(0, b"device")
                self.mapped(mm, driver, buf)
                assert driver.device.read(mm, buf.addr, 6) == b"device"

    def test_pages_that_nobody_shares_are_not_announced(self, mm: pm.AddressSpace) -> None:
        needs("pagemap")
        buf = filled(mm, 4)
        with Driver(mm) as driver:
            self.mapped(mm, driver, buf)
            with pm.pin_user_pages(mm, buf.addr, 4):
                assert driver.device.read(mm, buf.addr, 2) == bytes(buf[0:2])
            assert driver.updates == []

    def test_a_refused_pin_announces_nothing(self, mm: pm.AddressSpace) -> None:
        needs("pagemap")
        buf = mm.mmap(4 * PAGE)
        mm.mprotect(buf.addr + 3 * PAGE, PAGE, mmap.PROT_READ)
        with Driver(mm) as driver:
            self.mapped(mm, driver, buf)
            assert errno_of(pm.pin_user_pages, mm, buf.addr, 4) == errno.EFAULT
            assert driver.updates == []
            assert driver.device.read(mm, buf.addr, 2) == bytes(2)

    def test_without_the_page_table_all_is_announced(self) -> None:
        with pm.AddressSpace(disable=["pagemap"]) as mm:
            buf = filled(mm, 4)
            with Driver(mm) as driver, driver.range(buf.addr, buf.addr + 4 * PAGE):
                with pm.pin_user_pages(mm, buf.addr, 4) as pin:
                    assert pin.read() == bytes(buf)
                    assert ((pin.pfns >> np.uint64(62)) == 3).all()
                assert [(u.start, u.end) for u in driver.updates] == [(buf.addr, buf.addr + 4 * PAGE)]

    def test_a_driver_that_does_not_clear_is_found_out(self, mm: pm.AddressSpace) -> None:
        needs("pagemap")
        buf = mm.mmap(PAGE)
        sub = pm.IntervalNotifier(mm, buf.addr, PAGE, lambda sub, range, seq: sub.set_seq(seq))
        device = pm.Device("forgetful")
        pfns = np.zeros(1, np.uint64)
        seq = sub.read_begin()
        pm.hmm_range_fault(sub, buf.addr, buf.addr + PAGE, pfns, default_flags=FAULT, seq=seq)
        assert device.page_table.map(sub, seq, buf.addr, pfns)
        with pm.pin_user_pages(mm, buf.addr, 1) as pin:
            pin.write(0, b"new page")
            with pytest.raises(pm.StaleAccessError):
                device.read(mm, buf.addr, 8)
        device.page_table.clear(buf.addr, buf.addr + PAGE)
        sub.remove()


class TestAccess:
    def test_against_a_model(self, mm: pm.AddressSpace) -> None:
        rng = np.random.default_rng(7)
        size = 96 * PAGE
        buf = filled(mm, 96)
        model = bytearray(bytes(buf))
        with pm.pin_user_pages(mm, buf.addr, 96) as pin:
            for _ in range(200):
                offset = int(rng.integers(0, size))
                n = int(rng.integers(0, min(size - offset, 3 * PAGE) + 1))
                if rng.integers(2):
                    data = rng.bytes(n)
                    pin.write(offset, data)
                    model[offset : offset + n] = data
                else:
                    assert pin.read(offset, n) == bytes(model[offset : offset + n])
            assert pin.read() == bytes(buf) == bytes(model)

    def test_into_what_is_given(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 300)
        into = np.zeros(300 * PAGE // 8, np.uint64)
        with pm.pin_user_pages(mm, buf.addr, 300) as pin:
            pin.read_into(0, into)
            assert into.tobytes() == bytes(buf)
            pin.write(0, into[::-1].copy())
        assert bytes(buf) == into[::-1].tobytes()
        assert mm.stats()["pin_read_bytes"] == mm.stats()["pin_write_bytes"] == 300 * PAGE

    def test_its_own_memory(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 2)
        first = bytes(buf[0:PAGE])
        with pm.pin_user_pages(mm, buf.addr, 2) as pin:
            pin.write(PAGE, memoryview(buf).cast("B")[:PAGE])
        assert bytes(buf[PAGE : 2 * PAGE]) == first

    @pytest.mark.parametrize(
        ("offset", "n"), [(-1, 1), (0, 2 * PAGE + 1), (2 * PAGE, 1), (3 * PAGE, 0), (1 << 70, 1), (0, -1)]
    )
    def test_beyond_the_pin(self, mm: pm.AddressSpace, offset: int, n: int) -> None:
        buf = filled(mm, 2)
        with pm.pin_user_pages(mm, buf.addr, 2) as pin:
            assert errno_of(pin.read, offset, n) == errno.EINVAL
            assert pin.read(2 * PAGE) == pin.read(PAGE, 0) == b""
        if n > 0:
            assert errno_of(pin.write, offset, bytes(n)) == errno.EINVAL

    def test_into_memory_that_is_gone(self, mm: pm.AddressSpace) -> None:
        buf, other = filled(mm, 2), filled(mm, 2)
        view = memoryview(other).cast("B")
        with pm.pin_user_pages(mm, buf.addr, 2) as pin:
            mm.munmap(other.addr + PAGE, PAGE)
            # Not pytest.raises(): the view in a garbage cycle with its traceback crashes CPython 3.11.
            assert errno_of(pin.read_into, 0, view) == errno.EFAULT
            assert bytes(other[0:PAGE]) == bytes(buf[0:PAGE])
            assert errno_of(pin.write, 0, view) == errno.EFAULT

    def test_many_threads(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 8)
        wrong: list[int] = []
        with pm.pin_user_pages(mm, buf.addr, 8) as pin:

            def work(page: int) -> None:
                for turn in range(50):
                    pin.write(page * PAGE, bytes([turn]) * PAGE)
                    if pin.read(page * PAGE, PAGE) != bytes([turn]) * PAGE:
                        wrong.append(page)

            threads = [threading.Thread(target=work, args=(page,)) for page in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not wrong
