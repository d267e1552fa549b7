"""What cannot be pinned: the errno, where, why, and nothing left pinned."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import confined
import pytest
from mirroring import PAGE, filled
from pinning import FLAGS, kept
from seams import errno_of, foreign

import pymirror as pm
from pymirror import gup_flags
from pymirror._shim import ffi, lib


def refused(mm: pm.AddressSpace, start: int, npages: int, flags: int = FLAGS) -> pm.MirrorError:
    """The refusal, after which no more is pinned than before."""
    before = kept(), mm.stats()["pins"], mm.stats()["pin_slots"]
    with pytest.raises(pm.MirrorError) as failed:
        pm.pin_user_pages(mm, start, npages, flags)
    assert (kept(), mm.stats()["pins"], mm.stats()["pin_slots"]) == before
    assert failed.value.hint
    return failed.value


class TestFlags:
    @pytest.mark.parametrize("flags", [0, pm.FOLL_WRITE, pm.FOLL_LONGTERM])
    def test_both_are_needed(self, mm: pm.AddressSpace, flags: int) -> None:
        error = refused(mm, filled(mm, 1).addr, 1, flags)
        assert error.errno == errno.EOPNOTSUPP
        assert "an io_uring pins for" in str(error)

    @pytest.mark.parametrize("flag", [pm.FOLL_PIN, pm.FOLL_GET, 1 << 16, 1 << 18, 1 << 30, -1])
    def test_of_the_kernels_own_and_unknown(self, mm: pm.AddressSpace, flag: int) -> None:
        assert refused(mm, filled(mm, 1).addr, 1, FLAGS | flag).errno == errno.EINVAL

    @pytest.mark.parametrize("flag", list(gup_flags._DRIVERS))
    def test_that_an_io_uring_has_not(self, mm: pm.AddressSpace, flag: int) -> None:
        error = refused(mm, filled(mm, 1).addr, 1, FLAGS | flag)
        assert error.errno == errno.EOPNOTSUPP
        assert gup_flags._DRIVERS[flag][0] in str(error)


INTERVALS: dict[str, Callable[[int], tuple[int, int]]] = {
    "unaligned": lambda addr: (addr + 1, 1),
    "empty": lambda addr: (addr, 0),
    "negative": lambda addr: (addr, -1),
    "below": lambda addr: (-PAGE, 1),
    "above": lambda addr: ((1 << 47) - PAGE, 2),
    "far above": lambda addr: (1 << 47, 1),
    "more than addresses": lambda addr: (addr, 1 << 52),
}


@pytest.mark.parametrize("which", list(INTERVALS))
def test_intervals_that_make_no_sense(mm: pm.AddressSpace, which: str) -> None:
    assert refused(mm, *INTERVALS[which](filled(mm, 2).addr)).errno == errno.EINVAL


@pytest.mark.needs("io_uring")
class TestMemory:
    def test_a_hole(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 8)
        pm.unpin_user_pages(pm.pin_user_pages(mm, buf.addr, 1))
        foreign.mmap(buf.addr + 5 * PAGE, PAGE, 0, 0x32)
        mm.munmap(buf.addr + 5 * PAGE, PAGE)
        error = refused(mm, buf.addr, 8)
        assert (error.errno, error.addr, error.vma) == (errno.EFAULT, buf.addr + 5 * PAGE, None)

    def test_far_more_than_is_mapped(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 8)
        error = refused(mm, buf.addr, ((1 << 47) - buf.addr) // PAGE)
        assert error.errno == errno.EFAULT

    @pytest.mark.parametrize("prot", [0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_EXEC])
    def test_without_permission(self, mm: pm.AddressSpace, prot: int) -> None:
        buf = filled(mm, 8)
        mm.mprotect(buf.addr + 3 * PAGE, PAGE, prot)
        error = refused(mm, buf.addr, 8)
        assert (error.errno, error.addr) == (errno.EFAULT, buf.addr + 3 * PAGE)
        assert error.vma is not None
        assert "mprotect()" in (error.hint or "")

    def test_special_memory(self, mm: pm.AddressSpace) -> None:
        special = next(vma for vma in mm.vmas() if vma.special and vma.name != "[vsyscall]")
        error = refused(mm, special.start, 1)
        assert error.errno == errno.EFAULT
        assert "the kernel's own" in str(error)

    def test_a_file_on_disk_that_is_shared(self, mm: pm.AddressSpace, disk: Any) -> None:
        buf = mm.mmap(2 * PAGE, shared=True, fd=disk.fileno())
        content = bytes(buf)
        error = refused(mm, buf.addr, 2)
        assert error.errno == errno.EFAULT
        assert "FOLL_LONGTERM" in str(error)
        assert error.vma is not None
        assert bytes(buf) == content

    @pytest.mark.parametrize("shared", [False, True])
    def test_beyond_the_end_of_a_file(self, mm: pm.AddressSpace, shared: bool) -> None:
        fd = os.memfd_create("short")
        try:
            os.ftruncate(fd, PAGE)
            buf = mm.mmap(3 * PAGE, shared=shared, fd=fd)
        finally:
            os.close(fd)
        error = refused(mm, buf.addr, 3)
        assert (error.errno, error.addr) == (errno.EFAULT, buf.addr + PAGE)
        assert "beyond the end of the file" in str(error)

    def test_secret_memory(self, mm: pm.AddressSpace) -> None:
        try:
            fd = foreign._call("syscall", 447, 0)
        except OSError:
            pytest.skip("not on this kernel: memfd_secret()")
        try:
            os.ftruncate(fd, PAGE)
            buf = mm.mmap(PAGE, shared=True, fd=fd)
        finally:
            os.close(fd)
        assert "secret" in str(refused(mm, buf.addr, 1))


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Any:
    """A file of two pages beside the tests, so not on tmpfs as a rule."""
    path = request.path.with_name(f".pinned-{os.getpid()}")
    with path.open("w+b") as file:
        path.unlink()
        file.write(b"on disk!" * 1024)
        file.flush()
        if os.stat(request.path).st_dev in _memory_devices():
            pytest.skip("not on this machine: the tests are on tmpfs")
        yield file


def _memory_devices() -> set[int]:
    found = set()
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            if line.partition(" - ")[2].split()[0] == "tmpfs":
                major, minor = map(int, line.split()[2].split(":"))
                found.add(os.makedev(major, minor))
    return found


@pytest.mark.root
class TestSlots:
    def test_when_all_are_taken(self, mm: pm.AddressSpace) -> None:
        buf = filled(mm, 1)
        with pm.pin_user_pages(mm, buf.addr, 1):
            request = ffi.new("struct pm_pinning *", {"start": buf.addr, "npages": 1})
            pins = [ffi.new("pm_pin **") for _ in range(mm.stats()["pin_slots_max"] - 1)]
            try:
                for pin in pins:
                    assert lib.pm_pin_create(mm.native, request, pin) == 0
                error = refused(mm, buf.addr, 1)
                assert error.errno == errno.ENOSPC
                assert "16,384" in (error.hint or "")
            finally:
                for pin in pins:
                    lib.pm_pin_put(pin[0])
        assert mm.stats()["pin_slots"] == 0

    def test_more_than_a_gibibyte_takes_two(self, mm: pm.AddressSpace) -> None:
        piece, gib = 4 << 20, 1 << 30
        fd = os.memfd_create("piece")
        os.ftruncate(fd, piece)
        area = foreign.mmap(0, gib + piece, 0, 0x4022)
        try:
            for at in range(0, gib + piece, piece):
                foreign.mmap(area + at, piece, 3, 0x11, fd)
            with pm.pin_user_pages(mm, area, (gib + piece) // PAGE) as pin:
                assert mm.stats()["pin_slots"] == 2
                pin.write(gib - 3, b"across")
                assert pin.read(piece - 3, 3) + pin.read(gib, 3) == b"across"
        finally:
            foreign.munmap(area, gib + piece)
            os.close(fd)


def confined_run(script: str, **confinement: Any) -> Any:
    """What a script prints as JSON when it is run with less than this machine has."""
    done = subprocess.run(
        confined.command(confinement, sys.executable, "-c", script),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MEMLOCK = """
import json, pymirror as pm
with pm.AddressSpace() as mm:
    buf = mm.mmap(32 << 12)
    pin = pm.pin_user_pages(mm, buf.addr, 8)
    try:
        pm.pin_user_pages(mm, buf.addr + (8 << 12), 24)
        raised = None
    except pm.MirrorError as error:
        raised = error
    with pm.pin_user_pages(mm, buf.addr + (8 << 12), 4) as more:
        more.write(0, b"within")
        inside = bytes(buf[8 << 12 : (8 << 12) + 6]).decode()
    pins = mm.stats()["pins"]
    pm.unpin_user_pages(pin)
    print(json.dumps([raised and raised.errno, str(raised), raised and raised.hint, inside, pins]))
"""


@pytest.mark.needs("io_uring")
class TestMemlock:
    def test_beyond_the_limit(self) -> None:
        """The limit counts all that a user has pinned: a few pages go to the ring itself."""
        nobody_else = {"user": 50000 + os.getpid() % 10000} if _may_lock() else {}
        number, text, hint, inside, pins = confined_run(
            MEMLOCK, limits={"MEMLOCK": [64 << 10, 64 << 10]}, **nobody_else
        )
        assert number == errno.ENOMEM
        assert "RLIMIT_MEMLOCK is 64 KiB" in text
        assert "32 KiB pinned" in text
        assert "96 KiB are asked for" in text
        assert "memlock" in hint
        assert "CAP_IPC_LOCK" in hint
        assert (inside, pins) == ("within", 1)

    def test_with_the_capability_there_is_none(self) -> None:
        if not _may_lock():
            pytest.skip("needs root (CAP_IPC_LOCK)")
        assert confined_run(MEMLOCK, limits={"MEMLOCK": 0})[0] is None


def _may_lock() -> bool:
    with open("/proc/self/status") as lines:
        return any(line.startswith("CapEff:") and int(line.split()[1], 16) >> 14 & 1 for line in lines)


class TestFeature:
    def test_switched_off(self) -> None:
        with (
            pm.AddressSpace(disable=["io_uring"]) as mm,
            pytest.raises(pm.FeatureError, match="io_uring") as refused,
        ):
            pm.pin_user_pages(mm, filled(mm, 1).addr, 1)
        assert refused.value.feature == "io_uring"
        assert "PYMIRROR_DISABLE" in refused.value.command

    def test_by_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYMIRROR_DISABLE", "io_uring")
        with pm.AddressSpace() as mm:
            assert errno_of(pm.pin_user_pages, mm, filled(mm, 1).addr, 1) == errno.EOPNOTSUPP

    @pytest.mark.usefixtures("nothing_switched_off")
    def test_refused_by_a_sandbox(self) -> None:
        setup = 425
        script = """
import json, pymirror as pm
with pm.AddressSpace() as mm:
    try:
        pm.pin_user_pages(mm, mm.mmap(4096).addr, 1)
    except pm.FeatureError as error:
        print(json.dumps([error.errno, error.command]))
"""
        number, command = confined_run(script, seccomp=[[setup, errno.EPERM]])
        assert number == errno.EPERM
        assert "io_uring_disabled" in command
