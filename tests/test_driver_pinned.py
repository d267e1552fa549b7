"""The pinning driver: what is pinned stays, the cache and its stale hits, the notifier that cures them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest
from dma import nothing_mapped
from hypothesis import given, settings
from hypothesis import strategies as st
from mirroring import PAGE, as_bytes, filled
from racing import CHANGES, changes, in_child
from seams import Background, errno_of, needs, points

import pymirror as pm
from pymirror.drivers.pinned import Pinned

PAGES = 8


@pytest.fixture(autouse=True)
def rings() -> None:
    needs("io_uring")


@pytest.fixture(params=[False, True], ids=["blind", "notified"])
def driver(request: pytest.FixtureRequest, mm: pm.AddressSpace) -> Iterator[Pinned]:
    with Pinned(mm, notified=request.param, timeout=10.0) as made:
        yield made
    check_all_given_back(made)


@pytest.fixture
def blind(mm: pm.AddressSpace) -> Iterator[Pinned]:
    with Pinned(mm) as made:
        yield made
    check_all_given_back(made)


@pytest.fixture
def notified(mm: pm.AddressSpace) -> Iterator[Pinned]:
    with Pinned(mm, notified=True, timeout=10.0) as made:
        yield made
    check_all_given_back(made)


def check_all_given_back(driver: Pinned) -> None:
    assert nothing_mapped(driver.device)
    stats = driver.mm.stats()
    assert (stats["pins"], stats["interval_notifiers"], driver.pinned) == (0, 0, 0)
    assert not driver.mm.errors


def remap(mm: pm.AddressSpace, buf: pm.Region, text: bytes) -> None:
    """munmap, and other memory at the same address, as an allocator gives it."""
    other = mm.mmap(buf.size)
    as_bytes(other)[: len(text)] = text
    addr, size = buf.addr, buf.size
    mm.munmap(addr, size)
    mm.mremap(other.addr, size, size, flags=pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED, new_addr=addr)


class TestWhatBothDo:
    def test_the_device_reads_and_writes_pinned_pages(self, driver: Pinned) -> None:
        buf = filled(driver.mm, PAGES)
        assert driver.read(buf.addr + 10, 2 * PAGE) == bytes(as_bytes(buf)[10 : 10 + 2 * PAGE])
        driver.write(buf.addr + PAGE - 2, b"device")
        assert bytes(as_bytes(buf)[PAGE - 2 : PAGE + 4]) == b"device"
        assert driver.pinned == 3 * PAGE
        assert (driver.read(buf.addr, 0), driver.write(buf.addr, b"")) == (b"", None)

    def test_what_is_registered_is_found_again(self, driver: Pinned) -> None:
        buf = filled(driver.mm, PAGES)
        driver.read(buf.addr, buf.size)
        for page in range(PAGES):
            driver.read(buf.addr + page * PAGE, 8)
        stats = driver.stats
        assert (stats.misses, stats.hits, stats.registrations, stats.pages) == (1, PAGES, 1, PAGES)
        assert driver.mm.stats()["pinned_pages"] == PAGES

    def test_what_overlaps_becomes_one(self, driver: Pinned) -> None:
        buf = filled(driver.mm, PAGES)
        driver.read(buf.addr, 3 * PAGE)
        driver.read(buf.addr + 5 * PAGE, 2 * PAGE)
        driver.read(buf.addr + 2 * PAGE, 4 * PAGE)
        (one,) = driver.cached
        assert (one.start, one.end) == (buf.addr, buf.addr + 7 * PAGE)
        assert (driver.stats.merges, driver.pinned) == (1, 7 * PAGE)

    def test_what_only_touches_does_not(self, driver: Pinned) -> None:
        buf = filled(driver.mm, PAGES)
        for page in (0, 2, 1):
            driver.read(buf.addr + page * PAGE, PAGE)
        assert (len(driver.cached), driver.stats.merges) == (3, 0)

    def test_a_registration_that_is_used_outlives_the_cache(self, driver: Pinned) -> None:
        buf = filled(driver.mm, PAGES)
        with driver.registered(buf.addr, PAGE) as used:
            driver.flush()
            assert (driver.cached, driver.pinned) == ([], PAGE)
            assert used.daddrs is not None
            assert driver.device.dma_read(int(used.daddrs[0]), 4) == bytes(as_bytes(buf)[:4])
            assert errno_of(driver.close) == errno.EBUSY
        assert driver.pinned == 0

    def test_a_fork_changes_nothing(self, driver: Pinned) -> None:
        buf = filled(driver.mm, PAGES)
        driver.read(buf.addr, 4)

        def child() -> None:
            as_bytes(buf)[:4] = b"them"
            assert errno_of(driver.read, buf.addr + PAGE, 4) == errno.ESRCH
            driver.close()

        assert in_child(child) == 0
        as_bytes(buf)[:4] = b"ours"
        assert driver.read(buf.addr, 4) == b"ours"
        assert driver.stats.misses == 1

    def test_refusals(self, driver: Pinned) -> None:
        buf = filled(driver.mm, PAGES)
        driver.mm.munmap(buf.addr + 2 * PAGE, PAGE)
        driver.mm.mprotect(buf.addr + 4 * PAGE, PAGE, mmap.PROT_READ)
        assert errno_of(driver.read, buf.addr + PAGE, 2 * PAGE) == errno.EFAULT
        assert errno_of(driver.read, buf.addr + 4 * PAGE, 1) == errno.EFAULT
        for addr, n in ((buf.addr, -1), (1 << 47, 1), (-PAGE, 5)):
            assert errno_of(driver.register, addr, n) == errno.EINVAL
        assert errno_of(Pinned, driver.mm, cache_size=-1) == errno.EINVAL
        assert (driver.pinned, driver.cached) == (0, [])
        with driver.lock:
            assert errno_of(driver.read, buf.addr, 1) == errno.EDEADLK

    def test_what_is_put_is_put_once(self, driver: Pinned) -> None:
        buf = filled(driver.mm, 1)
        mine, also = (driver.register(buf.addr, 4) for _ in range(2))
        assert mine is also
        driver.put(mine)
        driver.put(also)
        assert errno_of(driver.put, mine) == errno.EINVAL
        driver.flush()
        assert (mine.users, driver.pinned) == (0, 0)
        with Pinned(driver.mm) as other:
            theirs = other.register(buf.addr, 4)
            assert errno_of(driver.put, theirs) == errno.EINVAL
            other.put(theirs)

    def test_ctrl_c_right_after_the_pin(self, driver: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
        buf = filled(driver.mm, 1)

        def strikes(_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(driver, "_evict", strikes)
            with pytest.raises(KeyboardInterrupt):
                driver.register(buf.addr, 4)
        assert (driver.pinned, driver.cached) == (0, [])
        assert driver.read(buf.addr, 4) == bytes(as_bytes(buf)[:4])


class TestTheCache:
    @pytest.fixture(params=[False, True], ids=["blind", "notified"])
    def small(self, request: pytest.FixtureRequest, mm: pm.AddressSpace) -> Iterator[Pinned]:
        with Pinned(mm, notified=request.param, cache_size=2 * PAGE) as made:
            yield made
        check_all_given_back(made)

    def test_the_least_recently_used_goes_first(self, small: Pinned) -> None:
        buf = filled(small.mm, PAGES)
        pages = [buf.addr + page * PAGE for page in range(PAGES)]
        for page in (0, 2, 0, 4):
            small.read(pages[page], 8)
        assert [one.start for one in small.cached] == [pages[0], pages[4]]
        assert (small.stats.evictions, small.pinned) == (1, 2 * PAGE)

    def test_what_is_used_is_not_evicted(self, small: Pinned) -> None:
        buf = filled(small.mm, PAGES)
        with small.registered(buf.addr, 3 * PAGE) as used:
            small.read(buf.addr + 5 * PAGE, 8)
            assert small.cached == [used]
        assert small.pinned == 0

    def test_without_room_nothing_is_kept(self, mm: pm.AddressSpace) -> None:
        with Pinned(mm, cache_size=0) as driver:
            buf = filled(mm, PAGES)
            driver.read(buf.addr, 8)
            assert (driver.pinned, driver.cached) == (0, [])


class TestTheKnownProblem:
    """Real pins: the page that the device has is still there, and nobody else sees it."""

    def test_after_munmap_and_mmap_the_device_reads_the_old_page(self, blind: Pinned) -> None:
        buf = blind.mm.mmap(PAGE)
        addr = buf.addr
        as_bytes(buf)[:3] = b"old"
        assert blind.read(addr, 3) == b"old"
        remap(blind.mm, buf, b"new")
        assert blind.read(addr, 3) == b"old"
        assert (blind.stats.hits, blind.stats.misses) == (1, 1)
        blind.flush()
        assert blind.read(addr, 3) == b"new"

    def test_what_it_writes_nobody_sees(self, blind: Pinned) -> None:
        buf = blind.mm.mmap(PAGE)
        addr = buf.addr
        blind.read(addr, 3)
        remap(blind.mm, buf, b"new")
        blind.write(addr, b"lost")
        assert blind.read(addr, 4) == b"lost"
        blind.flush()
        assert blind.read(addr, 4) == b"new\0"

    def test_a_notifier_is_the_cure(self, notified: Pinned) -> None:
        buf = notified.mm.mmap(PAGE)
        addr = buf.addr
        as_bytes(buf)[:3] = b"old"
        assert notified.read(addr, 3) == b"old"
        remap(notified.mm, buf, b"new")
        assert notified.read(addr, 3) == b"new"
        assert notified.stats.invalidations == 1

    @changes(CHANGES)
    def test_whatever_changes_the_memory(self, notified: Pinned, change: str) -> None:
        needs("uffd_events")
        buf = filled(notified.mm, 4)
        notified.read(buf.addr, buf.size)
        CHANGES[change](notified.mm, buf.addr + PAGE)
        notified.mm.sync()
        assert (notified.cached, notified.pinned, notified.stats.invalidations) == ([], 0, 1)

    def test_what_is_in_use_is_not_taken_from_the_device(self, notified: Pinned) -> None:
        buf = filled(notified.mm, 1)
        first = bytes(as_bytes(buf)[:4])
        with notified.registered(buf.addr, PAGE) as used:
            notified.mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            assert used.daddrs is not None
            assert notified.device.dma_read(int(used.daddrs[0]), 4) == first
            assert notified.read(buf.addr, 4) == bytes(4)
        assert notified.pinned == PAGE

    def test_memory_that_goes_while_it_is_pinned_is_not_cached(self, notified: Pinned) -> None:
        buf = filled(notified.mm, 1)
        with points("PIN_PINNED") as point:
            read = Background(notified.read, buf.addr, 4)
            point.wait()
            change = Background(notified.mm.madvise, buf.addr, PAGE, mmap.MADV_DONTNEED)
            point.release()
            assert read.result() in (bytes(4), bytes([0, 1, 2, 3]))
            change.result()
        assert notified.read(buf.addr, 4) == bytes(4)

    def test_the_end_of_the_address_space(self) -> None:
        mm = pm.AddressSpace()
        driver = Pinned(mm, notified=True)
        buf = filled(mm, PAGES)
        driver.read(buf.addr, buf.size)
        mm.close()
        assert (driver.pinned, driver.cached) == (0, [])
        assert errno_of(driver.read, buf.addr, 4) == errno.ESRCH
        driver.close()
        assert nothing_mapped(driver.device)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["read", "write", "cpu", "drop", "remap", "use", "put", "flush", "fork"]),
            st.integers(0, PAGES * PAGE - 1),
            st.integers(0, 3 * PAGE),
        ),
        max_size=20,
    ),
    st.sampled_from([0, 2 * PAGE, 1 << 20]),
)
@settings(deadline=None, max_examples=40, derandomize="CI" in os.environ)
def test_a_notified_cache_is_never_stale(steps: list[tuple[str, int, int]], cache_size: int) -> None:
    with pm.AddressSpace() as mm:
        driver = Pinned(mm, notified=True, cache_size=cache_size, timeout=10.0)
        buf = mm.mmap(PAGES * PAGE)
        addr, model, used = buf.addr, bytearray(buf.size), []
        for number, (step, at, n) in enumerate(steps, 1):
            n = min(n, len(model) - at)
            page = at // PAGE
            if step == "read":
                assert driver.read(addr + at, n) == model[at : at + n]
            elif step == "write":
                driver.write(addr + at, bytes([number]) * n)
                model[at : at + n] = bytes([number]) * n
            elif step == "cpu":
                # By the address: the Region is another's by now.
                ctypes.memset(addr + at, number, 1)
                model[at] = number
            elif step == "drop":
                mm.madvise(addr + page * PAGE, PAGE, mmap.MADV_DONTNEED)
                model[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
            elif step == "remap":
                fresh = filled(mm, 1)
                model[page * PAGE : (page + 1) * PAGE] = as_bytes(fresh)
                where = addr + page * PAGE
                mm.mremap(fresh.addr, PAGE, PAGE, flags=pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED, new_addr=where)
            elif step == "use" and n:
                used.append(driver.register(addr + at, n))
            elif step == "put" and used:
                driver.put(used.pop(0))
            elif step == "flush":
                driver.flush()
            elif step == "fork":
                assert in_child(lambda: None) == 0
        for registration in used:
            driver.put(registration)
        driver.close()
        check_all_given_back(driver)
