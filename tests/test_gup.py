"""Pinned pages: what a pin holds, how it is read and written, what ends it."""

from __future__ import annotations

import errno
import mmap

import pytest
from mirroring import PAGE, filled
from seams import errno_of, foreign

import pymirror as pm

FLAGS = pm.FOLL_WRITE | pm.FOLL_LONGTERM


def kept(status: str = "VmPin") -> int:
    """Bytes that this process has pinned, by the kernel's own account."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(status + ":"))


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


class TestTheEnd:
    def test_unpinning_twice_names_both_places(self, mm: pm.AddressSpace) -> None:
        pin = pm.pin_user_pages(mm, mm.mmap(PAGE).addr, 1)
        pm.unpin_user_pages(pin)
        with pytest.raises(pm.MirrorError, match=r"pinned at .*test_gup.py:\d+ and unpinned at .*test_gup"):
            pm.unpin_user_pages(pin)
        assert errno_of(pin.read) == errno.EINVAL

    def test_close_takes_the_pages_back_and_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        before = kept()
        with pm.AddressSpace() as mm:
            pin = pm.pin_user_pages(mm, mm.mmap(PAGE).addr, 1)
        assert kept() == before
        assert "never unpinned" in caplog.text
        assert "test_gup.py" in caplog.text
        assert errno_of(pin.read) == errno_of(pm.unpin_user_pages, pin) == errno.ESRCH
