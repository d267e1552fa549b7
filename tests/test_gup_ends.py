"""What ends a pin, and what comes between while one is made."""

from __future__ import annotations

import errno
import gc
import mmap
import sys
import threading
from typing import Any

import pytest
from mirroring import PAGE, Driver, filled
from pinning import kept
from seams import Background, errno_of, foreign, needs, points

import pymirror as pm
from pymirror._shim import lib
from pymirror.pin_registry import PinRegistry


class TestTheEnd:
    def test_unpinning_twice_names_both_places(self, mm: pm.AddressSpace) -> None:
        pin = pm.pin_user_pages(mm, mm.mmap(PAGE).addr, 1)
        pm.unpin_user_pages(pin)
        with pytest.raises(
            pm.MirrorError, match=r"pinned at .*test_gup_ends.py:\d+ and unpinned at .*test_gup_ends"
        ):
            pm.unpin_user_pages(pin)
        assert errno_of(pin.read) == errno_of(pin.write, 0, b"x") == errno.EINVAL
        assert mm.stats()["pins"] == 0

    def test_each_pin_of_a_page_counts(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        first, second = (pm.pin_user_pages(mm, buf.addr, 1) for _ in range(2))
        content = bytes(buf)
        mm.munmap(buf.addr, PAGE)
        pm.unpin_user_pages(first)
        assert second.read() == content
        pm.unpin_user_pages(second)

    def test_dirty_pages_are_counted(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 6)
        pm.unpin_user_pages(pm.pin_user_pages(mm, buf.addr, 3), dirty=True)
        pm.unpin_user_pages(pm.pin_user_pages(mm, buf.addr, 2))
        assert mm.stats()["pin_dirtied_pages"] == 3
        with pm.pin_user_pages(mm, buf.addr, 1):
            pass
        assert mm.stats()["pin_dirtied_pages"] == 4

    def test_in_the_block_is_well(self, mm: pm.AddressSpace) -> None:
        with pm.pin_user_pages(mm, mm.mmap(PAGE).addr, 1) as pin:
            assert pin.pinned
            pm.unpin_user_pages(pin)
            assert not pin.pinned

    def test_close_takes_the_pages_back_and_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        before = kept()
        with pm.AddressSpace() as mm:
            pin = pm.pin_user_pages(mm, mm.mmap(PAGE).addr, 1)
        assert kept() == before
        (line,) = caplog.messages
        assert "never unpinned" in line
        assert "test_gup_ends.py:" in line
        assert errno_of(pin.read) == errno_of(pm.unpin_user_pages, pin) == errno.ESRCH
        assert errno_of(pm.pin_user_pages, mm, pin.start, 1) == errno.ESRCH

    def test_collection_gives_the_pages_back_and_warns(self, mm: pm.AddressSpace) -> None:
        before = kept()
        with pytest.warns(ResourceWarning, match=r"pinned at .*test_gup_ends.py:\d+"):
            pm.pin_user_pages(mm, mm.mmap(PAGE).addr, 1)
        assert kept() == before
        assert mm.stats()["pins"] == 0

    def test_amid_an_access(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        pin = pm.pin_user_pages(mm, buf.addr, 1)
        with points("PIN_PIECE") as point:
            reading = Background(pin.read)
            point.wait()
            pm.unpin_user_pages(pin)
            point.release()
            assert errno_of(reading.result) == errno.EINVAL

    def test_close_amid_an_access(self) -> None:
        before = kept()
        with pm.AddressSpace() as mm:
            buf = filled(mm, 1)
            content = bytes(buf)
            pin = pm.pin_user_pages(mm, buf.addr, 1)
            with points("PIN_PIECE") as point:
                reading = Background(pin.read)
                point.wait()
                closing = Background(mm.close)
                assert closing.stays()
                point.release()
                closing.result()
        assert kept() == before
        assert reading.result() == content


@pytest.mark.needs("io_uring")
class TestRaces:
    def test_memory_exchanged_before_it_is_pinned_is_looked_at_anew(self, mm: pm.AddressSpace) -> None:
        """The pfns are of the pages that are pinned, though a foreign munmap came in between."""
        needs("pfn", "uffd_events")
        buf = filled(mm, 2)
        mm.watch(buf.addr, buf.addr + buf.size)
        with points("WALK_BEFORE_READ") as point:
            pinning = Background(pm.pin_user_pages, mm, buf.addr, 2)
            point.wait()
            changing = Background(foreign.madvise, buf.addr, 2 * PAGE, mmap.MADV_DONTNEED)
            changing.result()
            point.release()
            pin = pinning.result()
        buf[0:3] = b"cpu"
        assert pin.read(0, 3) == b"cpu"
        pm.unpin_user_pages(pin)

    @pytest.mark.parametrize("change", ["dontneed", "munmap"])
    def test_memory_exchanged_after_it_was_pinned_is_let_go(self, mm: pm.AddressSpace, change: str) -> None:
        needs("pagemap", "uffd_events")
        buf = filled(mm, 2)
        before = kept()
        with points("PIN_PINNED") as point:
            pinning = Background(pm.pin_user_pages, mm, buf.addr, 2)
            point.wait()
            assert kept() == before + 2 * PAGE
            if change == "munmap":
                foreign.munmap(buf.addr, 2 * PAGE)
            else:
                foreign.madvise(buf.addr, 2 * PAGE, mmap.MADV_DONTNEED)
            point.release()
            if change == "munmap":
                assert errno_of(pinning.result) == errno.EFAULT
            else:
                with pinning.result() as pin:
                    buf[0:3] = b"cpu"
                    assert pin.read(0, 3) == b"cpu"
        assert kept() == before

    def test_pages_that_the_kernel_moved_are_reported_as_detected(
        self, mm: pm.AddressSpace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Out of a movable zone, of which a machine like this has none: the native call is made to say so."""
        buf = filled(mm, 4)
        second = buf.addr + PAGE

        class Moving:
            def __getattr__(self, name: str) -> Any:
                return getattr(lib, name)

            def pm_pin_create(self, native: Any, request: Any, made: Any) -> int:
                ret = int(lib.pm_pin_create(native, request, made))
                request.changed_start, request.changed_end = second, second + PAGE
                return ret

        needs("pagemap")
        monkeypatch.setattr("pymirror.gup_pinning.lib", Moving())
        with (
            Driver(mm) as driver,
            driver.range(buf.addr, buf.addr + buf.size),
            pm.pin_user_pages(mm, buf.addr, 4),
        ):
            assert [(u.start, u.end, u.guarantee) for u in driver.updates] == [
                (second, second + PAGE, pm.Guarantee.DETECTED)
            ]

    def test_ctrl_c_leaves_no_pin(self, mm: pm.AddressSpace, monkeypatch: pytest.MonkeyPatch) -> None:
        """Right after the native call has made it."""
        buf = filled(mm, 1)
        before = kept()

        class Struck:
            def __getattr__(self, name: str) -> Any:
                return getattr(lib, name)

            def pm_pin_create(self, *args: Any) -> int:
                assert lib.pm_pin_create(*args) == 0
                assert kept() > before
                raise KeyboardInterrupt

        monkeypatch.setattr("pymirror.gup_pinning.lib", Struck())
        with pytest.raises(KeyboardInterrupt):
            pm.pin_user_pages(mm, buf.addr, 1)
        gc.collect()
        assert (kept(), mm.stats()["pins"]) == (before, 0)

    def test_it_waits_for_an_invalidation_and_gives_up(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        named = rf"MIGRATE {buf.addr:#x}-.*, begun by thread {threading.current_thread().name}"
        with mm.invalidate(buf.addr, buf.addr + PAGE, pm.Event.MIGRATE):
            pinning = Background(pm.pin_user_pages, mm, buf.addr, 1)
            with pytest.raises(pm.MirrorError, match=named) as refused:
                pinning.result()
            assert refused.value.errno == errno.ETIMEDOUT
        pm.unpin_user_pages(pm.pin_user_pages(mm, buf.addr, 1))


def test_the_registry_is_read_while_others_write() -> None:
    class Pin:
        start, unpinned_at = 0, None

    registry = PinRegistry()
    kept: list[Any] = [Pin() for _ in range(1000)]
    for pin in kept:
        registry.add(pin)

    def write() -> None:
        for _ in range(20_000):
            pin: Any = Pin()
            registry.add(pin)
            registry.discard(pin)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        writing = Background(write)
        while not writing.done:
            assert len(registry.live()) >= len(kept)
        writing.result()
    finally:
        sys.setswitchinterval(switch)
    assert len(registry.live()) == len(kept)
