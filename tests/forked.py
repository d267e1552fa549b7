"""A forked child that checks its memory, at the fork and when it is reaped, and then writes its own."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import zlib
from typing import NoReturn

from model import PAGE, Model, Page

CHILD_TIMEOUT_S = 20.0
_ANSWER = struct.Struct("=QQ")
_OK = 0
_LIBC = ctypes.CDLL(None, use_errno=True)


class Child:
    """It must see private pages as they were at the fork, and others as their files have them."""

    def __init__(self, model: Model, mark: bytes) -> None:
        """Fork. ``mark`` is what the child writes to the first page of each mapping that it may write."""
        self.mark = mark
        # A child has no claim to pages of the hugetlb pool: where that is empty it dies at a touch.
        pages = [(a, page) for a, page in model.pages.items() if page.readable and page.huge != "hugetlb"]
        through = [(addr, page) for addr, page in pages if page.file is not None and page.own is None]
        self.shared = [(addr, page.file, page.index) for addr, page in through]
        self._private = [
            (addr, page.allowed) for addr, page in pages if page.file is None or page.own is not None
        ]
        now = [(addr, page.allowed) for addr, page in pages]
        self.private_marks = _first_of_each([(a, p) for a, p in pages if p.writable and not p.shared])
        self.shared_marks = _first_of_each([(a, p) for a, p in pages if p.writable and p.shared])
        go, self._go = os.pipe()
        self._answer, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(now, go, answer)
        os.close(go)
        os.close(answer)
        self._heard("right after the fork")

    def checksum_of_shared(self) -> int:
        """What the child must find in the pages of files when it is reaped."""
        checksum = 0
        for _, file, index in self.shared:
            assert file is not None
            checksum = zlib.crc32(file.at(index), checksum)
        return checksum

    def reap(self) -> list[tuple[int, int]]:
        """Let it look and write, and wait for its end: (inode, index) of the shared pages that it marked."""
        expected = self.checksum_of_shared()
        os.write(self._go, b"g")
        checksum = self._heard("at its end")
        self._end()
        assert checksum == expected, "the child read other bytes than it must in shared memory"
        return [(page.file.inode, page.index) for _, page in self.shared_marks if page.file is not None]

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._end()

    def _heard(self, when: str) -> int:
        """The child's checksum, once it has found nothing wrong."""
        poll = select.poll()
        poll.register(self._answer, select.POLLIN)
        data = os.read(self._answer, _ANSWER.size) if poll.poll(CHILD_TIMEOUT_S * 1000) else b""
        if len(data) != _ANSWER.size:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"the child gave no answer {when}, wait status {self._end():#x}")
        wrong, checksum = _ANSWER.unpack(data)
        assert wrong == _OK, f"{when} the child read other bytes than it must at {wrong:#x}"
        return int(checksum)

    def _end(self) -> int:
        pid, self.pid = self.pid, 0
        _, status = os.waitpid(pid, 0)
        os.close(self._go)
        os.close(self._answer)
        return status

    def _run(self, now: list[tuple[int, tuple[bytes, ...]]], go: int, answer: int) -> NoReturn:
        """In the child: only this thread is here, and _exit is the only way out. It ends with its parent."""
        try:
            # With its write end open here, the end of the parent would go unseen.
            os.close(self._go)
            os.write(answer, _ANSWER.pack(_compare(now), 0))
            if os.read(go, 1):
                checksum = 0
                for addr, _, _ in self.shared:
                    checksum = zlib.crc32(_read(addr), checksum)
                os.write(answer, _ANSWER.pack(_compare(self._private) or self._write(), checksum))
        finally:
            os._exit(0)

    def _write(self) -> int:
        for addr, _ in self.private_marks + self.shared_marks:
            ctypes.memmove(addr, self.mark, len(self.mark))
            if ctypes.string_at(addr, len(self.mark)) != self.mark:
                return addr
        return _OK


def _compare(pages: list[tuple[int, tuple[bytes, ...]]]) -> int:
    """The first page that holds none of what it may, 0 if there is none."""
    return next((addr for addr, allowed in pages if _read(addr) not in allowed), _OK)


def _read(addr: int) -> bytes:
    return ctypes.string_at(addr, PAGE)


def _first_of_each(pages: list[tuple[int, Page]]) -> list[tuple[int, Page]]:
    first: dict[int, tuple[int, Page]] = {}
    for addr, page in pages:
        first.setdefault(page.mapping, (addr, page))
    return list(first.values())


def raw_clone() -> None:
    """A fork that libc's fork handlers do not see; the child ends at once."""
    stack = ctypes.create_string_buffer(64 << 10)
    top = (ctypes.addressof(stack) + len(stack)) & ~0xF
    exit_now = ctypes.cast(_LIBC._exit, ctypes.c_void_p)
    pid = _LIBC.clone(exit_now, ctypes.c_void_p(top), int(signal.SIGCHLD), None)
    assert pid > 0, os.strerror(ctypes.get_errno())
    os.waitpid(pid, 0)
