"""What a process with an address space shows, and to whom (docs/security.md): tried, not believed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import confined
import exposed
import pytest
from racing import in_child
from seams import errno_of, foreign, needs

import pymirror as pm
from pymirror._shim import ffi, lib
from pymirror.inspection import look_at

TARGET = Path(__file__).parent / "exposed.py"
NOBODY, SOMEBODY = 65534, 65533
PAGE = 4096
#: What the descriptors of an address space lead to.
KINDS = (
    r"/proc/\d+/(maps|pagemap|ksm_merging_pages|mem)",
    r"anon_inode:\[(userfaultfd|eventfd|timerfd|io_uring)\]",
    r"/memfd:pymirror(-status|-stage)? \(deleted\)",
)
#: Places that others look into, and where names can be guessed.
SHARED_PLACES = (tempfile.gettempdir(), "/dev/shm", "/dev/mqueue", "/run", "/var/tmp")
REFUSED = {errno.EACCES, errno.EPERM}

_libc = ctypes.CDLL(None, use_errno=True)


def descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # of the listing itself
    return found


def names_in_shared_places() -> set[str]:
    own = os.getuid()
    found = set()
    for place in filter(os.path.isdir, SHARED_PLACES):
        with os.scandir(place) as entries:
            found |= {one.path for one in entries if one.stat(follow_symlinks=False).st_uid == own}
    return found


def tables() -> str:
    """Of the kernel: shared memory segments of System V, and sockets with a name."""
    read = [Path("/proc/sysvipc/shm").read_text(), Path("/proc/net/unix").read_text()]
    return "\n".join(line for text in read for line in text.splitlines() if "pymirror" in line)


@dataclass
class Made:
    everything: exposed.Exposed
    trace: Path
    new: dict[int, str]


@pytest.fixture
def made(tmp_path: Path, nothing_left_behind: None) -> Iterator[Made]:
    before = descriptors()
    trace = tmp_path / "trace.json"
    everything = exposed.Exposed(trace)
    after = descriptors()
    yield Made(everything, trace, {fd: link for fd, link in after.items() if before.get(fd) != link})
    everything.close()


class TestWhatIsMade:
    def test_every_descriptor_is_of_a_known_kind(self, made: Made) -> None:
        known = [*KINDS, re.escape(str(made.trace))]
        assert len(made.new) >= 4
        assert [
            link for link in made.new.values() if not any(re.fullmatch(kind, link) for kind in known)
        ] == []

    def test_every_descriptor_closes_at_an_exec(self, made: Made) -> None:
        assert {
            fd: made.new[fd] for fd in made.new if not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        } == {}
        listing = subprocess.run(
            [sys.executable, "-c", "import os; print(*map(os.path.realpath, os.scandir('/proc/self/fd')))"],
            close_fds=False,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "pymirror" not in listing.stdout
        assert "anon_inode" not in listing.stdout

    def test_every_file_is_for_this_user_alone(self, made: Made) -> None:
        files = {
            fd: os.fstat(fd) for fd, link in made.new.items() if not link.startswith(("/proc/", "anon_"))
        }
        assert len(files) >= 3
        for fd, about in files.items():
            assert stat.S_IMODE(about.st_mode) == 0o600, made.new[fd]
            assert about.st_uid == os.geteuid()

    def test_a_umask_of_nothing_gives_others_no_trace(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            with pm.Trace(tmp_path / "open.json"):
                pass
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "open.json").stat().st_mode) == 0o600

    def test_nothing_has_a_name_that_others_could_know(self, tmp_path: Path) -> None:
        before, tables_before = names_in_shared_places(), tables()
        everything = exposed.Exposed(tmp_path / "trace.json")
        try:
            ours = {name for name in names_in_shared_places() - before if "pymirror" in name.lower()}
            assert ours == set()
            assert tables() == tables_before
        finally:
            everything.close()

    def test_the_status_page_is_sealed(self, made: Made) -> None:
        """Who may read it can neither change what it says, nor kill this process by cutting it off."""
        (fd,) = [fd for fd, link in made.new.items() if "pymirror-status" in link]
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            assert errno_of(os.write, again, b"x") == errno.EPERM
            assert errno_of(os.ftruncate, again, 0) == errno.EPERM
            assert errno_of(foreign.mmap, 0, PAGE, 3, 1, again) == errno.EPERM
            assert len(os.pread(again, PAGE, 0)) == PAGE
        finally:
            os.close(again)

    def test_a_forked_child_has_none_of_it(self, made: Made) -> None:
        def child() -> None:
            left = {fd: link for fd, link in descriptors().items() if made.new.get(fd) == link}
            assert [link for link in left.values() if not link.startswith("/memfd:pymirror (")] == []

        assert in_child(child) == 0


@dataclass
class Target:
    """A process of a user, with everything open; what it says of itself."""

    pid: int
    addr: int
    arrays: dict[str, list[int]]
    texts: list[str]
    trace: Path


@contextmanager
def target(folder: Path, uid: int | None) -> Iterator[Target]:
    # By other users, as far as the folder goes that pytest keeps to itself.
    for one in (folder, *folder.parents[:2]):
        one.chmod(one.stat().st_mode | 0o011)
    folder.chmod(0o777)
    trace = folder / "trace.json"
    command = [sys.executable, str(TARGET), str(trace)]
    if uid is not None:
        command = confined.command({"user": uid}, *command)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Target(**json.loads(process.stdout.readline()), trace=trace)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with target(tmp_path_factory.mktemp("roots"), None) as one:
        yield one


@pytest.fixture(scope="module")
def nobodys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with target(tmp_path_factory.mktemp("nobodys"), NOBODY) as one:
        yield one


def as_user(uid: int, call: Callable[[], None]) -> int:
    """Its exit code, in a child that is this user and nothing else."""

    def child() -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        call()

    return in_child(child)


def read_memory(pid: int, addr: int) -> None:
    room = ctypes.create_string_buffer(8)
    local, remote = struct.pack("PN", ctypes.addressof(room), 8), struct.pack("PN", addr, 8)
    if _libc.process_vm_readv(pid, local, 1, remote, 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")


def attach(pid: int) -> None:
    if _libc.ptrace(16, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    os.waitpid(pid, 0)
    _libc.ptrace(17, pid, None, None)


def take_descriptor(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        if _libc.syscall(438, pidfd, 3, 0) < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(pidfd)


def advise(pid: int) -> None:
    """process_madvise, which can discard pages."""
    pidfd = os.pidfd_open(pid)
    try:
        span = struct.pack("PN", 0, PAGE)
        if _libc.syscall(440, pidfd, span, ctypes.c_size_t(1), 4, 0) < 0:
            raise OSError(ctypes.get_errno(), "process_madvise")
    finally:
        os.close(pidfd)


def read_file(path: str) -> None:
    with open(path, "rb") as file:
        file.read(16)


#: Of /proc/PID: who may not ptrace it may not read these.
PROC_FILES = ("mem", "maps", "smaps", "pagemap", "environ", "auxv", "syscall", "stack")


def ways_to(one: Target) -> dict[str, Callable[[], object]]:
    proc = f"/proc/{one.pid}"
    paths = [f"{proc}/{name}" for name in PROC_FILES] + [f"{proc}/fd/{fd}" for fd in os.listdir(f"{proc}/fd")]
    return {
        **{path: lambda path=path: read_file(path) for path in paths},  # type: ignore[misc]
        "fd": lambda: os.listdir(f"{proc}/fd"),
        "map_files": lambda: os.listdir(f"{proc}/map_files"),
        "process_vm_readv": lambda: read_memory(one.pid, one.addr),
        "ptrace": lambda: attach(one.pid),
        "pidfd_getfd": lambda: take_descriptor(one.pid),
        "process_madvise": lambda: advise(one.pid),
        "trace": lambda: read_file(str(one.trace)),
        "inspect": lambda: look_at(one.pid),
    }


@pytest.mark.root
class TestOtherUsers:
    @pytest.mark.parametrize("owner", ["roots", "nobodys"])
    def test_reach_nothing_of_it(self, roots: Target, nobodys: Target, owner: str) -> None:
        ways = ways_to(roots if owner == "roots" else nobodys)

        def child() -> None:
            got = {name: errno_of(way) for name, way in ways.items()}
            assert {name: number for name, number in got.items() if number not in REFUSED} == {}

        assert as_user(SOMEBODY, child) == 0

    def test_its_own_user_does(self, nobodys: Target) -> None:
        """What others are refused is there to be had."""

        def child() -> None:
            read_memory(nobodys.pid, nobodys.addr)
            read_file(str(nobodys.trace))
            (space,) = look_at(nobodys.pid).spaces
            assert space.watched_ranges > 0

        assert as_user(NOBODY, child) == 0


#: Of an entry of any array: its page frame number.
MASK = (1 << 52) - 1


def physical(pid: int, addr: int) -> set[int]:
    pages = exposed.PAGES
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        entries = struct.unpack(f"<{pages}Q", os.pread(fd, pages * 8, addr // PAGE * 8))
    finally:
        os.close(fd)
    return {entry & MASK for entry in entries}


def numbers(text: str) -> set[int]:
    found = {int(number, 16) for number in re.findall(r"0x([0-9a-fA-F]+)", text)}
    found |= {int(number) for number in re.findall(r"(?<![0-9a-fA-Fx.])\d+", text)}
    return found | {number >> 12 for number in found}


@pytest.mark.root
class TestPageFrameNumbers:
    def test_an_ordinary_user_sees_none(self, nobodys: Target) -> None:
        """Neither in arrays, nor in anything that is said or written: of 64 pages, those that root sees."""
        real = physical(nobodys.pid, nobodys.addr)
        assert len(real) == exposed.PAGES
        assert 0 not in real
        for name, values in nobodys.arrays.items():
            assert {value & MASK for value in values} == {0}, name
        said = numbers("\n".join([*nobodys.texts, nobodys.trace.read_text(), repr(look_at(nobodys.pid))]))
        # Some count may be the number of a page by chance, but not of half of them.
        assert len(real & said) < exposed.PAGES // 2

    def test_that_is_where_root_sees_them(self, roots: Target) -> None:
        needs("pfn")
        real = physical(roots.pid, roots.addr)
        for name in ("range", "page table", "pfn", "migrate", "hmm_range_fault", "hmm_dma_map"):
            assert {value & MASK for value in roots.arrays[name]} == real, name

    def test_who_gives_up_root_opens_a_space_without_them(self, mm: pm.AddressSpace) -> None:
        """What was opened before keeps what it could: rights are those of the moment of opening."""
        needs("pfn")
        assert "pfn" in mm.features

        def child() -> None:
            _libc.prctl(4, 1, 0, 0, 0)
            with pm.AddressSpace() as space:
                assert "pfn" not in space.features
                buf = space.mmap(PAGE)
                buf[0] = 1
                ret = ffi.new("uint64_t *")
                assert lib.pm_pagemap_read(space.native, buf.addr, 1, ret) == 0
                assert ret[0] >> 63
                assert ret[0] & MASK == 0

        assert as_user(NOBODY, child) == 0


class TestInspect:
    def test_names_that_a_terminal_would_obey_are_shown_as_text(self) -> None:
        """A process may call itself, and its locks, what it likes."""
        evil = b"\x1b]0;x\x07\r\n"
        status: Any = {
            "magic": struct.unpack("<Q", b"mirror01")[0],
            "layout": lib.PM_STATUS_LAYOUT,
            "pid": os.getpid(),
            "version": evil,
            "wait": [{"since_ns": 1, "held_since_ns": 1, "tid": os.getpid(), "lock": evil}],
        }
        page = bytes(ffi.buffer(ffi.new("struct pm_status *", status))).ljust(PAGE, b"\0")
        script = (
            "import ctypes, os, sys\n"
            f"ctypes.CDLL(None).prctl(15, {evil[:15]!r})\n"
            "fd = os.memfd_create('pymirror-status')\n"
            "os.write(fd, sys.stdin.buffer.read())\n"
            "print(flush=True)\n"
            "sys.stdin.close()\n"
            "import signal; signal.pause()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(page.replace(struct.pack("<I", os.getpid()), struct.pack("<I", process.pid)))
            process.stdin.close()
            process.stdout.readline()
            done = subprocess.run(
                [sys.executable, "-m", "pymirror.cli", "inspect", str(process.pid)], capture_output=True
            )
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        assert done.stderr == b""
        assert b"\\x1b]0;x" in done.stdout
        assert not set(done.stdout) & {0x1B, 0x07, 0x0D}
