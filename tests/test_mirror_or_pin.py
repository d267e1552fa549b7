"""The argument of the series, as tests: one way to map memory for DMA, for drivers that mirror and that pin.

First what both get from the part they share. Then what sets them apart: what each holds, and what munmap,
MADV_DONTNEED, a fork with copy-on-write, and mprotect do to each.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from dma import DmaDriver, mirrored, nothing_mapped, numbers, pages_of
from mirroring import PAGE
from racing import in_child
from seams import errno_of, needs

import pymirror as pm
from pymirror.pfn import PfnArray

PAGES = 16
MADV_DONTNEED = 4
PROT_READ = 1


@dataclass
class Mapped:
    """Memory of a process, mapped for a device by a driver of one kind."""

    mm: pm.AddressSpace
    buf: pm.Region
    bytes: Any
    device: pm.Device
    daddrs: PfnArray
    unmap: Callable[..., int]
    driver: DmaDriver | None = None

    def read(self, page: int, n: int = 8) -> bytes:
        return self.device.dma_read(int(self.daddrs[page]), n)

    def write(self, page: int, data: bytes) -> None:
        self.device.dma_write(int(self.daddrs[page]), data)


@contextmanager
def by_mirroring(mm: pm.AddressSpace, buf: pm.Region, device: pm.Device) -> Iterator[Mapped]:
    view = numbers(buf)
    with mirrored(mm, buf, device) as (driver, rng):
        daddrs = driver.map(rng)
        yield Mapped(
            mm, buf, view, device, daddrs, lambda **how: pm.hmm_range_dma_unmap(rng, device, **how), driver
        )


@contextmanager
def by_pinning(mm: pm.AddressSpace, buf: pm.Region, device: pm.Device) -> Iterator[Mapped]:
    needs("io_uring")
    view = numbers(buf)
    with pm.pin_user_pages(mm, buf.addr, pages_of(buf), pm.FOLL_WRITE | pm.FOLL_LONGTERM) as pin:
        daddrs = pm.gup_range_dma_map(pin, device)
        yield Mapped(mm, buf, view, device, daddrs, lambda **how: pm.gup_range_dma_unmap(pin, device, **how))
        pm.gup_range_dma_unmap(pin, device)


HOW = {"hmm": by_mirroring, "gup": by_pinning}


@pytest.fixture(params=["hmm", "gup"])
def mapped(request: pytest.FixtureRequest, mm: pm.AddressSpace) -> Iterator[Mapped]:
    with HOW[request.param](mm, mm.mmap(PAGES * PAGE), pm.Device("d")) as made:
        yield made


@pytest.fixture
def mirror(mm: pm.AddressSpace) -> Iterator[Mapped]:
    with by_mirroring(mm, mm.mmap(PAGES * PAGE), pm.Device("m")) as made:
        yield made


@pytest.fixture
def pin(mm: pm.AddressSpace) -> Iterator[Mapped]:
    with by_pinning(mm, mm.mmap(PAGES * PAGE), pm.Device("p")) as made:
        yield made


def pinned_pages(mm: pm.AddressSpace) -> int:
    return int(mm.stats()["pinned_pages"])


class TestWhatBothShare:
    """The same assertions, over hmm_range_dma_map() and over gup_range_dma_map()."""

    def test_there_is_one_dma_address_a_page(self, mapped: Mapped) -> None:
        assert mapped.daddrs.dtype == np.uint64
        assert np.unique(mapped.daddrs).size == PAGES
        assert not (mapped.daddrs % PAGE).any()

    def test_pages_in_a_row_are_one_run_of_iovas(self, mapped: Mapped) -> None:
        assert (np.diff(mapped.daddrs.astype(np.int64)) == PAGE).all()
        whole = mapped.device.dma_read(int(mapped.daddrs[0]), PAGES * PAGE)
        assert whole == mapped.bytes.tobytes()

    def test_the_device_reads_what_the_cpu_writes(self, mapped: Mapped) -> None:
        mapped.bytes[3 * PAGE : 3 * PAGE + 8] = np.frombuffer(b"from cpu", np.uint8)
        assert mapped.read(3) == b"from cpu"

    def test_the_cpu_reads_what_the_device_writes(self, mapped: Mapped) -> None:
        mapped.write(5, b"from the device")
        assert mapped.bytes[5 * PAGE : 5 * PAGE + 15].tobytes() == b"from the device"

    def test_access_across_pages_and_bytes(self, mapped: Mapped) -> None:
        at = int(mapped.daddrs[1]) + PAGE - 3
        mapped.device.dma_write(at, b"abcdef")
        assert (
            mapped.device.dma_read(at, 6) == mapped.bytes[2 * PAGE - 3 : 2 * PAGE + 3].tobytes() == b"abcdef"
        )

    def test_beside_it_is_nothing(self, mapped: Mapped) -> None:
        assert errno_of(mapped.device.dma_read, int(mapped.daddrs[0]) - 1, 1) == errno.EFAULT
        assert errno_of(mapped.device.dma_read, int(mapped.daddrs[-1]) + PAGE - 1, 2) == errno.EFAULT

    def test_unmapped_it_is_nothing(self, mapped: Mapped) -> None:
        assert mapped.unmap(dirty=True) == PAGES
        assert mapped.unmap() == 0
        with pytest.raises(pm.IommuFaultError) as fault:
            mapped.read(0)
        assert fault.value.reason == pm.IommuFaultReason.UNMAPPED
        assert nothing_mapped(mapped.device)
        assert mapped.device.domain.stats()["dirtied"] == PAGES

    def test_a_part_can_be_unmapped(self, mapped: Mapped) -> None:
        start = mapped.buf.addr + 4 * PAGE
        assert mapped.unmap(start=start, end=start + 2 * PAGE) == 2
        assert errno_of(mapped.read, 4) == errno.EFAULT
        assert mapped.read(6) == mapped.bytes[6 * PAGE : 6 * PAGE + 8].tobytes()
        assert mapped.unmap() == PAGES - 2
        assert nothing_mapped(mapped.device)

    @pytest.mark.parametrize("side", [-1, 1])
    def test_of_a_change_elsewhere_it_unmaps_nothing(self, mapped: Mapped, side: int) -> None:
        """A callback hands on what it was told, which is of the whole address space."""
        start = mapped.buf.addr + side * PAGES * PAGE
        for end in (start, start + PAGE, start + PAGES * PAGE):
            assert mapped.unmap(start=start, end=end, daddrs=mapped.daddrs) == 0
        mapped.mm.mmap(PAGE).close()
        assert not mapped.mm.errors
        assert mapped.daddrs.all()
        assert mapped.read(0) == mapped.bytes[:8].tobytes()

    @pytest.mark.parametrize("how", HOW)
    def test_no_iovas_are_left(self, mm: pm.AddressSpace, how: str) -> None:
        small = pm.Device("small", iommu=pm.IommuDomain(first=0x1000, last=0x8FFF))
        with (
            pytest.raises(pm.MirrorError, match="no IOVAs") as failed,
            HOW[how](mm, mm.mmap(PAGES * PAGE), small),
        ):
            pass
        assert failed.value.errno == errno.EFAULT
        assert nothing_mapped(small)

    @pytest.mark.parametrize("how", HOW)
    @pytest.mark.root
    def test_without_an_iommu_addresses_are_physical(self, mm: pm.AddressSpace, how: str) -> None:
        needs("pfn")
        direct = pm.Device("direct", iommu=False)
        with HOW[how](mm, mm.mmap(PAGES * PAGE), direct) as made:
            for page in range(PAGES):
                assert made.read(page) == made.bytes[page * PAGE : page * PAGE + 8].tobytes()
        assert nothing_mapped(direct)


class TestWhatIsHeld:
    def test_a_pin_holds_its_pages(self, pin: Mapped) -> None:
        assert pinned_pages(pin.mm) == PAGES

    def test_a_mirror_holds_none(self, mirror: Mapped) -> None:
        assert pinned_pages(mirror.mm) == 0


class TestMadviseDontneed:
    """The pages are thrown away; the CPU gets new ones."""

    def test_a_mirror_loses_the_pages(self, mirror: Mapped) -> None:
        mirror.mm.madvise(mirror.buf.addr, PAGE, MADV_DONTNEED)
        assert errno_of(mirror.read, 0) == errno.EFAULT
        assert mirror.read(1) == mirror.bytes[PAGE : PAGE + 8].tobytes()

    def test_a_pin_has_the_old_page_still_which_is_stale(self, pin: Mapped) -> None:
        old = pin.bytes[:8].tobytes()
        pin.mm.madvise(pin.buf.addr, PAGE, MADV_DONTNEED)
        assert pin.bytes[:8].tobytes() == bytes(8)
        assert pin.read(0) == old
        pin.write(0, b"nobody sees this")
        assert pin.bytes[:16].tobytes() == bytes(16)
        assert pin.read(0, 16) == b"nobody sees this"

    def test_a_mirror_that_forgets_is_told_not_served(self, mirror: Mapped) -> None:
        assert mirror.driver is not None
        mirror.driver.forgets = True
        mirror.mm.madvise(mirror.buf.addr, PAGE, MADV_DONTNEED)
        with pytest.raises(pm.StaleDmaError) as stale:
            mirror.read(0)
        assert stale.value.mapping is not None
        assert stale.value.mapping.site.file.endswith("dma.py")
        assert stale.value.invalidated is not None
        assert stale.value.invalidated.event is pm.Event.CLEAR
        assert "did not tear down" in str(stale.value)
        assert mirror.device.dma_stats.stale == 1


class TestMunmap:
    def test_a_mirror_loses_the_pages(self, mirror: Mapped) -> None:
        start = mirror.buf.addr
        mirror.mm.munmap(start, 2 * PAGE)
        assert errno_of(mirror.read, 0) == errno.EFAULT
        assert mirror.read(2) == mirror.bytes[2 * PAGE : 2 * PAGE + 8].tobytes()

    def test_a_pin_has_them_still(self, pin: Mapped) -> None:
        old = pin.bytes[:8].tobytes()
        pin.mm.munmap(pin.buf.addr, PAGES * PAGE)
        assert pin.read(0) == old
        pin.write(0, b"to nobody")
        assert pin.read(0, 9) == b"to nobody"


class TestFork:
    """Both share the memory copy-on-write; the parent writes first."""

    def test_a_mirror_faults_the_parents_new_page(self, mirror: Mapped) -> None:
        assert in_child(lambda: None) == 0
        assert errno_of(mirror.read, 0) == errno.EFAULT
        mirror.bytes[:6] = np.frombuffer(b"parent", np.uint8)
        assert mirror.driver is not None
        rng = mirror.driver.mapped
        assert rng is not None
        rng.wait_until_valid()
        daddrs = mirror.driver.map(rng)
        assert mirror.device.dma_read(int(daddrs[0]), 6) == b"parent"

    def test_a_pinned_page_stays_the_parents(self, pin: Mapped) -> None:
        read, write = os.pipe()
        was = pin.bytes[:6].tobytes()

        def child() -> None:
            os.read(read, 1)
            os._exit(0 if pin.bytes[:6].tobytes() == was else 1)

        pid = os.fork()
        if pid == 0:
            child()
        pin.bytes[:6] = np.frombuffer(b"parent", np.uint8)
        assert pin.read(0, 6) == b"parent"
        pin.write(0, b"device")
        assert pin.bytes[:6].tobytes() == b"device"
        os.write(write, b".")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        os.close(read)
        os.close(write)


class TestMprotect:
    def test_a_mirror_is_invalidated_and_may_read_again(self, mirror: Mapped) -> None:
        mirror.mm.mprotect(mirror.buf.addr, PAGE, PROT_READ)
        assert errno_of(mirror.read, 0) == errno.EFAULT
        assert mirror.driver is not None
        rng = mirror.driver.mapped
        assert rng is not None
        rng.wait_until_valid()
        assert errno_of(mirror.driver.map, rng) == errno.EPERM
        rng.default_flags = pm.HMM_PFN_REQ_FAULT
        daddrs = mirror.driver.map(rng)
        assert mirror.device.dma_read(int(daddrs[0]), 8) == mirror.bytes[:8].tobytes()
        assert errno_of(mirror.device.dma_write, int(daddrs[0]), b"x") == errno.EFAULT

    def test_a_pin_does_not_notice(self, pin: Mapped) -> None:
        pin.mm.mprotect(pin.buf.addr, PAGE, PROT_READ)
        pin.write(0, b"through read-only memory")
        assert pin.bytes[:24].tobytes() == b"through read-only memory"


def test_the_wrong_unmap_of_a_pin_changes_nothing(pin: Mapped) -> None:
    pinned = pin.device.domain.mappings()[0]._owner
    assert isinstance(pinned, pm.PinnedPages)
    with pytest.raises(pm.MirrorError) as refused:
        pm.hmm_range_dma_unmap(pinned, pin.device)  # type: ignore[arg-type]
    assert refused.value.hint == "gup_range_dma_unmap() is for pinned pages"
    assert pin.read(0) == pin.bytes[:8].tobytes()


def test_a_pin_that_is_mapped_is_not_given_back(pin: Mapped, mm: pm.AddressSpace) -> None:
    other = pm.pin_user_pages(mm, pin.buf.addr, 1, pm.FOLL_WRITE | pm.FOLL_LONGTERM)
    device = pm.Device("other")
    daddrs = pm.gup_range_dma_map(other, device)
    assert errno_of(pm.unpin_user_pages, other) == errno.EBUSY
    assert device.dma_read(int(daddrs[0]), 4) == pin.bytes[:4].tobytes()
    pm.gup_range_dma_unmap(other, device)
    pm.unpin_user_pages(other)
    assert errno_of(pm.gup_range_dma_map, other, device) == errno.EINVAL
