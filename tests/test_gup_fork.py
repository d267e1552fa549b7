"""Pins and children: the parent keeps the pinned page, the child gets a copy and keeps nothing alive."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys

import pytest
from mirroring import FAULT, PAGE, Driver, filled
from pinning import kept
from racing import NativeFork, in_child, sleeping_clone, waiting_child
from seams import errno_of, needs

import pymirror as pm

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def rings(pid: int | str = "self") -> list[str]:
    """Descriptors of a process that would keep pins alive."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        if "io_uring" in target or "pymirror-stage" in target:
            found.append(target)
    return found


class TestFork:
    def test_the_parent_keeps_the_page(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 2)
        content = bytes(buf)
        with pm.pin_user_pages(mm, buf.addr, 2) as pin:

            def child() -> None:
                assert ctypes.string_at(buf.addr, 2 * PAGE) == content
                ctypes.memmove(buf.addr, b"child", 5)
                pin_error = errno_of(pin.read), errno_of(pm.unpin_user_pages, pin)
                assert pin_error == (errno.ESRCH, errno.ESRCH)
                assert not pin.pinned
                assert rings() == []

            assert in_child(child) == 0
            buf[0:6] = b"parent"
            assert pin.read(0, 6) == b"parent"
            pin.write(PAGE, b"device")
            assert bytes(buf[PAGE : PAGE + 6]) == b"device"

    def test_the_child_has_the_bytes_of_the_moment(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        content = bytes(buf)
        with pm.pin_user_pages(mm, buf.addr, 1) as pin:

            def child() -> None:
                assert ctypes.string_at(buf.addr, PAGE) == content

            with waiting_child(child) as go:
                pin.write(0, b"after the fork")
                go()
            assert bytes(buf[0:14]) == b"after the fork"

    def test_pinned_after_it_the_page_is_the_parents_own(self, mm: pm.AddressSpace) -> None:
        """The fork shared the page; the pin breaks that, and mirrors are told before."""
        needs("pagemap")
        buf = filled(mm, 2)
        content = bytes(buf)
        with Driver(mm) as driver:

            def child() -> None:
                assert ctypes.string_at(buf.addr, 2 * PAGE) == content

            with waiting_child(child) as go:
                with driver.range(buf.addr, buf.addr + 2 * PAGE) as rng:
                    rng.default_flags = FAULT
                    assert driver.device.page_table.map(rng, rng.fault())
                mm.sync()
                driver.updates.clear()
                with pm.pin_user_pages(mm, buf.addr, 2) as pin:
                    assert [(u.event, u.guarantee) for u in driver.updates] == [
                        (pm.Event.CLEAR, pm.Guarantee.BEFORE)
                    ]
                    assert driver.device.page_table.next() is None
                    pin.write(0, b"device")
                    assert bytes(buf[0:6]) == b"device"
                    go()

    def test_a_child_opens_its_own(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        with pm.pin_user_pages(mm, buf.addr, 1) as pin:

            def child() -> None:
                with pm.AddressSpace() as own, pm.pin_user_pages(own, buf.addr, 1) as theirs:
                    theirs.write(0, b"child")
                    assert ctypes.string_at(buf.addr, 5) == b"child"

            assert in_child(child) == 0
            assert pin.read() == bytes(buf)

    def test_of_a_library(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        with pm.pin_user_pages(mm, buf.addr, 1) as pin:
            assert NativeFork().result() == 0
            buf[0:3] = b"cpu"
            assert pin.read(0, 3) == b"cpu"


class TestChildrenThatKeepDescriptors:
    def test_a_raw_clone_keeps_no_pin_alive(self, mm: pm.AddressSpace) -> None:
        """It has the ring's descriptor and nobody told it to close it."""
        buf = filled(mm, 8)
        before = kept()
        pin = pm.pin_user_pages(mm, buf.addr, 8)
        with sleeping_clone() as pid:
            assert len(rings(pid)) == 2
            pm.unpin_user_pages(pin)
            assert kept() == before
            with pm.pin_user_pages(mm, buf.addr, 8) as again:
                buf[0:3] = b"cpu"
                assert again.read(0, 3) == b"cpu"

    def test_nor_does_it_after_close(self) -> None:
        before = kept()
        with pm.AddressSpace() as mm:
            buf = filled(mm, 8)
            pin = pm.pin_user_pages(mm, buf.addr, 8)
            content = pin.read()
            with sleeping_clone():
                pm.unpin_user_pages(pm.pin_user_pages(mm, buf.addr, 2))
                mm.close()
                assert kept() == before
                assert bytes(buf) == content
            assert errno_of(pin.read) == errno.ESRCH

    def test_an_exec_closes_it(self, mm: pm.AddressSpace) -> None:
        with pm.pin_user_pages(mm, filled(mm, 1).addr, 1):
            assert len(rings()) == 2
            listing = "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in '3456789' if"
            listing += " os.path.exists(f'/proc/self/fd/{n}')])"
            done = subprocess.run(
                [sys.executable, "-c", listing], close_fds=False, capture_output=True, text=True, check=True
            )
            assert "io_uring" not in done.stdout
            assert "pymirror" not in done.stdout
